"""The initialisers of an exported model under another edit, from the unedited weights that lie beside it.

NumPy only: patching a served model needs no PyTorch and no onnx.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open

from excise.editfile import Edit
from excise.errors import ArtefactError, EditError, NumericsError
from excise.manifest import Manifest, WeightEntry, hash_file, read_manifest

Array = npt.NDArray[Any]


class StoredWeights(Mapping[str, Array]):
    """The arrays of a safetensors file by name, each read when it is asked for."""

    def __init__(self, opened: Any) -> None:
        self._opened = opened
        self._names = frozenset(opened.keys())

    def __getitem__(self, name: str) -> Array:
        if name not in self._names:
            raise KeyError(name)
        array: Array = self._opened.get_tensor(name)
        return array

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._names))

    def __len__(self) -> int:
        return len(self._names)


@contextmanager
def base_weights(folder: Path, manifest: Manifest) -> Iterator[StoredWeights]:
    """The unedited float32 weights beside an exported model, by torch name, each (o, d) where it is linear.

    Raises:
        ArtefactError: they weren't kept, are missing, or aren't those that the manifest names.
    """
    name = manifest.base_weights
    if name is None:
        raise ArtefactError(f"{folder} keeps no unedited weights beside the model: export it again to patch it")
    path = folder / name
    expected = manifest.files.get(name)
    if not path.is_file() or expected is None:
        raise ArtefactError(f"{path} is missing, and excise.json lists it: export again")
    if path.stat().st_size != expected.size or hash_file(path) != expected.sha256:
        raise ArtefactError(f"{path} was altered: its SHA-256 isn't the manifest's; export again")
    try:
        with safe_open(path, framework="np") as opened:
            yield StoredWeights(opened)
    except SafetensorError as error:
        raise ArtefactError(f"{path} can't be read as safetensors ({error}): export again") from error


def in_initializer(weight: Array, *, transposed: bool, shape: tuple[int, ...]) -> Array:
    """A torch weight as an initialiser of ``shape`` holds it: transposed or not, a vector (c) perhaps as (c, 1, 1).

    A weight that doesn't fit comes back in its own shape.
    """
    found = weight.T if transposed else weight
    unit = [size for size in shape if size != 1]
    return found.reshape(shape) if unit == [size for size in found.shape if size != 1] else found


def edited_initializers(
    folder: Path, manifest: Manifest, edit: Edit | None, *, force: bool = False
) -> Iterator[tuple[str, WeightEntry, Array]]:
    """Torch name, place and values of every initialiser that an edit can move, in the order of their bytes.

    The values have the initialiser's shape (``in_initializer``) and dtype, rounded to it once; without an
    edit, and where the edit has nothing to say, they are the unedited ones. One is held at a time.

    Args:
        folder: What an export wrote.
        manifest: Its manifest.
        edit: Made for the unedited model, whatever edit the folder carries; None for the unedited values.
        force: Take it although it was made for other weights.

    Raises:
        ArtefactError: The unedited weights aren't there, or don't fit the manifest.
        EditError: The edit moves weights that can't be patched (FingerprintMismatch: it was made for another model).
        NumericsError: An edited weight isn't finite in the initialiser's dtype.
    """
    with base_weights(folder, manifest) as stored:
        if edit is not None:
            _check(folder, manifest, edit, stored, force)
        places = {name: manifest.weights[name] for name in stored if name in manifest.weights}
        if len(places) != len(stored):
            raise ArtefactError(f"{folder} keeps weights that excise.json doesn't place: export again")
        moved = frozenset(edit.sites) if edit is not None else frozenset()
        for name, place in sorted(places.items(), key=lambda item: item[1].offset):
            weight = stored[name]
            if edit is not None and name in moved:
                weight = edit.moved(name, weight)
            yield name, place, _as_stored(folder, name, place, weight)


def edited_values(folder: Path, edit: Edit) -> dict[str, Array]:
    """Values by initialiser, for a session that takes them in place of what the folder holds.

    Names, shapes and dtypes are the manifest's, and the graph is checked to be the one that the manifest describes:
    ONNX Runtime itself takes an unknown name without a word.

    Raises:
        ArtefactError: The folder has no manifest or another graph, or keeps the weights in the graph's own file.
        EditError, NumericsError: as ``edited_initializers``.
    """
    manifest = read_manifest(folder)
    values = {}
    for name, place, array in edited_initializers(folder, manifest, edit):
        if place.data is None:
            raise ArtefactError(f"{folder} holds {name} in {place.file} itself: run excise patch on it once")
        values[place.initializer] = array
    for file in {place.file for place in manifest.weights.values()}:
        if hash_file(folder / file) != manifest.files[file].sha256:
            raise ArtefactError(f"{folder / file} was altered: its SHA-256 isn't the manifest's; export again")
    return values


def _check(folder: Path, manifest: Manifest, edit: Edit, stored: StoredWeights, force: bool) -> None:
    component = next(iter(manifest.weights.values())).file.partition("/")[0]
    if edit.metadata.component != component:
        raise EditError(f"the edit is for a {edit.metadata.component}, and {folder} has a {component}: take another")
    if manifest.edit is not None and (baked := [site for site in manifest.edit.sites if site not in stored]):
        raise ArtefactError(
            f"{folder} was exported with an edit that also moved {baked[0]}, whose unedited values weren't kept: "
            "export the base model, and patch that"
        )
    beyond = [site for site in edit.sites if site not in stored]
    if beyond and (len(beyond) < len(edit.sites) or not edit.metadata.streams):
        raise EditError(
            f"the edit moves {beyond[0]} and {len(beyond) - 1} more, whose unedited values don't lie beside {folder}: "
            "run excise patch with it, which puts them there, or export the model with it"
        )
    edit.check(stored, force=force)


def _as_stored(folder: Path, name: str, place: WeightEntry, weight: Array) -> Array:
    """A weight in its initialiser's shape and dtype."""
    found = in_initializer(weight, transposed=place.transposed, shape=place.shape)
    if found.shape != place.shape:
        raise ArtefactError(f"{folder} keeps {name} with shape {found.shape}, not {place.shape}: export again")
    with np.errstate(over="ignore"):
        values = np.ascontiguousarray(found, dtype=np.dtype(place.dtype).newbyteorder("<"))
    if not np.isfinite(values).all():
        raise NumericsError(f"{name} isn't finite in {place.dtype}: export the model in fp32")
    return values
