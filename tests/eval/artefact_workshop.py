"""The demo model's edited export, and the tools that right and wrong artefacts are made of it with.

Whatever lies in files is changed in files, as a broken export, patch or copy would: the runtime opens what it finds.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import numpy_helper
from safetensors import safe_open

from excise.demo import MODEL
from excise.edit.erase import erase
from excise.edit.recipe import resolve
from excise.edited_initializers import edited_initializers
from excise.editfile import Edit
from excise.manifest import Manifest, read_manifest
from excise.serve.onnx_runtime import OnnxRuntime
from excise.serve.runtime import Progress, Request, Runtime

Array = npt.NDArray[Any]
Images = npt.NDArray[np.uint8]

TEXT_ENCODER, UNET = "text_encoder/model.onnx", "unet/model.onnx"


def edited_sites() -> tuple[str, ...]:
    """Torch names of the matrices that the edit moves: K and V of every cross-attention layer."""
    with safe_open(MODEL / "unet" / "diffusion_pytorch_model.safetensors", framework="np") as file:
        return tuple(name for name in sorted(file.keys()) if ".attn2.to_k." in name or ".attn2.to_v." in name)


@dataclass(frozen=True)
class Workshop:
    """Where artefacts are made.

    Attributes:
        folder: The right artefact as ``export_pipeline`` wrote it. Nothing changes it.
        edit: The edit that it carries.
        scratch: What is made goes here.
    """

    folder: Path
    edit: Edit
    scratch: Path
    _number: itertools.count[int] = field(default_factory=itertools.count)

    @cached_property
    def manifest(self) -> Manifest:
        return read_manifest(self.folder)

    def weights(self, edit: Edit | None) -> dict[str, Array]:
        """The 14 matrices under an edit, or without, by torch name with shape (o, 256)."""
        return {
            name: values.T if place.transposed else values
            for name, place, values in edited_initializers(self.folder, self.manifest, edit)
        }

    def another(self, preset: str = "weapons", **values: Any) -> Edit:
        """An edit of the demo model by a preset with other ``values``."""
        return erase(MODEL, resolve(preset, None, values), certificate=False)

    def copy(self, *changed: str) -> Path:
        """A copy of the right artefact, by hard links but for the files that are to be ``changed``."""
        out = self.scratch / f"artefact-{next(self._number)}"

        def place(source: str, target: str) -> None:
            own = Path(source).relative_to(self.folder).as_posix() in changed
            shutil.copyfile(source, target) if own else os.link(source, target)

        return Path(shutil.copytree(self.folder, out, copy_function=place))

    def rewritten(self, weights: Mapping[str, Array]) -> Path:
        """A copy with other values of some of the 14 matrices, each (o, 256); its manifest is the right one's."""
        places = [(self.manifest.weights[name], values) for name, values in weights.items()]
        out = self.copy(*{str(place.data) for place, _ in places})
        for place, values in places:
            stored = np.ascontiguousarray(values.T if place.transposed else values, place.dtype)
            assert stored.shape == place.shape
            with (out / str(place.data)).open("r+b") as stream:
                stream.seek(place.offset)
                stream.write(stored.tobytes())
        return out

    def reloaded(self, change: Callable[[str, Array], Array], names: Sequence[str] | None = None) -> Path:
        """A copy with other values of every float initialiser that lies beside the UNet's graph, or of ``names``."""
        graph = onnx.load(self.folder / UNET, load_external_data=False).graph
        chosen = [one for one in graph.initializer if one.external_data and one.data_type == onnx.TensorProto.FLOAT]
        chosen = [one for one in chosen if names is None or one.name in names]
        places = [(one, {entry.key: entry.value for entry in one.external_data}) for one in chosen]
        assert places
        out = self.copy(*{f"unet/{place['location']}" for _, place in places})
        for one, place in places:
            with (out / "unet" / place["location"]).open("r+b") as stream:
                stream.seek(int(place.get("offset", 0)))
                before = np.frombuffer(stream.read(4 * int(np.prod(one.dims))), "<f4").reshape(tuple(one.dims))
                after = np.ascontiguousarray(change(one.name, before), "<f4")
                assert after.shape == before.shape
                stream.seek(int(place.get("offset", 0)))
                stream.write(after.tobytes())
        return out

    def recoded(self, change: Callable[[str, Array], Array]) -> Path:
        """A copy with other initialisers in the text encoder; a weight without a name of its own has its node's."""
        out = self.copy(TEXT_ENCODER)
        model = onnx.load(out / TEXT_ENCODER)
        nodes = {node.input[1]: node.name for node in model.graph.node if node.op_type == "MatMul"}
        for one in model.graph.initializer:
            before = numpy_helper.to_array(one)
            after = change(nodes.get(one.name, one.name), before)
            if after is not before:
                one.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(after, before.dtype), one.name))
        (out / TEXT_ENCODER).unlink()
        onnx.save(model, out / TEXT_ENCODER)
        return out

    def configured(self, file: str, change: Callable[[Any], Any]) -> Path:
        """A copy whose JSON file ``file`` was changed in place."""
        out = self.copy(file)
        document = json.loads((out / file).read_text())
        change(document)
        (out / file).write_text(json.dumps(document))
        return out

    def initializer_of(self, node: str) -> str:
        """The name of the matrix that a ``MatMul`` of the UNet multiplies by."""
        graph = onnx.load(self.folder / UNET, load_external_data=False).graph
        (found,) = [one for one in graph.node if one.name == node]
        return str(found.input[1])

    def open(self, folder: Path | None = None, **options: Any) -> OnnxRuntime:
        """A folder in ONNX Runtime, by default the right one's."""
        return OnnxRuntime(folder or self.folder, **{"threads": 1, **options})


@dataclass
class Rewired:
    """A runtime with something wrong between the server's door and the model.

    ``requests`` and ``images`` change what goes in and comes out of each batch, ``steps`` and ``guidance`` the
    settings.
    """

    runtime: Runtime
    requests: Callable[[Sequence[Request]], Sequence[Request]] = lambda requests: requests
    images: Callable[[Images], Images] = lambda images: images
    steps: Callable[[int], int] = lambda steps: steps
    guidance: Callable[[float], float] = lambda scale: scale
    name: str = "rewired"

    def generate(
        self,
        requests: Sequence[Request],
        *,
        num_inference_steps: int = 50,
        guidance_scale: float = 7.5,
        progress: Progress | None = None,
    ) -> Images:
        """As the runtime, but for what is wrong."""
        images = self.runtime.generate(
            self.requests(requests),
            num_inference_steps=self.steps(num_inference_steps),
            guidance_scale=self.guidance(guidance_scale),
            progress=progress,
        )
        return np.ascontiguousarray(self.images(images))
