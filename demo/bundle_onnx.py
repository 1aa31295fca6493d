"""Write ``demo/onnx``: the bundled model as a bank of edits in ONNX, without the weights that ``demo/model`` holds.

Each initialiser of the export is a float16 tensor of ``demo/model`` in float32, transposed or not. Here it becomes that
tensor, read from the safetensors file itself (its bytes are ONNX external data as they stand), behind a Cast and a
Transpose that ONNX Runtime folds away when it opens the file. ``bundled_onnx`` puts the two together.

    python -m excise.demo.bundle_onnx --out demo/onnx
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from excise.demo import MODEL
from excise.demo.bundled_onnx import STORED, WEIGHTS
from excise.edit.erase import erase
from excise.edit.recipe import resolve
from excise.editfile import Edit
from excise.errors import ArtefactError
from excise.export.bank import EDIT_TRANSFORMS
from excise.export.onnx_export import export_pipeline
from excise.export.text_edit_folders import BANK_KIND, bank_folder
from excise.manifest import NAME, EditEntry, read_manifest, write_manifest
from excise.output import new_folder

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto, TensorProto

#: Smaller initialisers, in bytes, stay in the graph: biases and norms, some of them reshaped by the export.
_SMALL = 8192


@dataclass(frozen=True)
class Stored:
    """Where a safetensors file holds a tensor, by what its values are."""

    offset: int
    length: int
    shape: tuple[int, ...]
    transposed: bool


def edits() -> tuple[Edit, ...]:
    """What the bank holds: all weapons, and one of them alone."""
    weapons = resolve("weapons", None, {})
    pairs = [(concept, target) for concept, target in weapons.pairs() if concept.endswith("gun")]
    others = [concept for concept, _ in weapons.pairs() if not concept.endswith("gun")]
    gun = {
        "erase": [concept for concept, _ in pairs],
        "to": [target for _, target in pairs],
        "keep": [*weapons.kept(weapons.pairs()), *others],
    }
    return erase(MODEL, weapons), erase(MODEL, resolve("weapons", None, gun))


def bundle(out: Path) -> None:
    """Export, make the bank, take the weights out, and write the manifest of what ``bundled_onnx`` will put together.

    Raises:
        OutputError: ``out`` holds something already.
        ArtefactError: an initialiser isn't in ``demo/model``: what is exported is another model.
    """
    bank = edits()
    with new_folder(out) as partial, tempfile.TemporaryDirectory() as place:
        plain, whole = Path(place, "plain"), Path(place, "whole")
        export_pipeline(MODEL, plain, progress=_say)
        bank_folder(plain, whole, bank, with_base=True, link=False, progress=_say)
        manifest = read_manifest(whole)
        for component, stored in STORED.items():
            _without_weights(whole / component / "model.onnx", MODEL / stored)
            for left in (whole / component).glob("*.onnx_data"):
                left.unlink()
        for component, stored in STORED.items():
            shutil.copyfile(MODEL / stored, whole / component / WEIGHTS)
        (whole / NAME).unlink()
        shutil.rmtree(whole / "vae_encoder", ignore_errors=True)  # no text-to-image server reads it
        rows = [None, *(EditEntry.of(edit) for edit in bank)]
        write_manifest(whole, kind=BANK_KIND, base=manifest.base, bank=rows, tools=manifest.tools)
        for component in STORED:
            (whole / component / WEIGHTS).unlink()
        shutil.copytree(whole, partial, dirs_exist_ok=True)


def _without_weights(file: Path, weights: Path) -> None:
    """Rewrite a self-contained or external ONNX file so that its weights are those of a safetensors file."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    model = onnx.load(file)
    places = dict(_stored(weights))
    nodes, kept = [], []
    for tensor in model.graph.initializer:
        value = numpy_helper.to_array(tensor)
        if value.dtype != np.float32 or value.nbytes < _SMALL or tensor.name.startswith(EDIT_TRANSFORMS):
            kept.append(tensor)
            continue
        if (place := places.get(_key(value))) is None:
            raise ArtefactError(f"{file}: no tensor of {weights} has the values of {tensor.name} {value.shape}")
        half = _external(tensor.name, place)
        kept.append(half)
        cast = helper.make_node("Cast", [half.name], [tensor.name], f"{tensor.name}/cast", to=TensorProto.FLOAT)
        if place.transposed:
            cast.output[0] = f"{tensor.name}/float"
            swap = helper.make_node("Transpose", [cast.output[0]], [tensor.name], f"{tensor.name}/swap", perm=[1, 0])
            nodes += [cast, swap]
        else:
            nodes.append(cast)
    _replace(model, kept, nodes)
    file.write_bytes(model.SerializeToString())


def _replace(model: ModelProto, initializers: list[TensorProto], first: list[NodeProto]) -> None:
    rest = list(model.graph.node)
    del model.graph.initializer[:], model.graph.node[:]
    model.graph.initializer.extend(initializers)
    model.graph.node.extend([*first, *rest])


def _external(name: str, place: Stored) -> TensorProto:
    from onnx import TensorProto

    tensor = TensorProto(name=f"{name}/half", data_type=TensorProto.FLOAT16, dims=place.shape)
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in (("location", WEIGHTS), ("offset", str(place.offset)), ("length", str(place.length))):
        tensor.external_data.add(key=key, value=value)
    return tensor


def _stored(file: Path) -> Iterator[tuple[tuple[tuple[int, ...], bytes], Stored]]:
    """Every tensor of a safetensors file by its float32 values, and every matrix by those of its transpose too."""
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        start, end = entry["data_offsets"]
        value = np.frombuffer(content, np.float16, offset=8 + length + start, count=(end - start) // 2)
        single: npt.NDArray[np.float32] = value.reshape(entry["shape"]).astype(np.float32)
        shape = single.shape
        if single.ndim == 2:
            yield _key(single.T), Stored(8 + length + start, end - start, shape, transposed=True)
        yield _key(single), Stored(8 + length + start, end - start, shape, transposed=False)


def _key(value: npt.NDArray[np.float32]) -> tuple[tuple[int, ...], bytes]:
    return value.shape, np.ascontiguousarray(value).tobytes()


def _say(message: str) -> None:
    print(message, file=sys.stderr)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Write the bundled model's ONNX graphs, without weights.")
    parser.add_argument("--out", type=Path, required=True, help="A new folder.")
    bundle(parser.parse_args().out)
