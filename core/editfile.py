"""The edit file: what an edit does to a model's weights, without the model.

A ``*.safetensors`` file. Linear layers that read the same kind of text embedding form a stream, and share a transform,
``W_i ← W_i T``. For the stream S it holds ``S.transform`` (d × d, float64) and the exact low-rank factors ``S.left``
(d × r) and ``S.right`` (r × d) of ``T − I``. For a layer-wise edit (technique ``tensor``) it holds, for each step n,
``S.steps.<n>.shared`` (d × d), ``S.steps.<n>.scaled`` (k × d × d) and ``S.steps.<n>.scalars`` (sites × k):
``W_i ← W_i (shared − Σ_k scalars[i, k] scaled[k])``. What an imported or trained edit moved in another way is
``delta.<name>`` (float32, of the weight's shape): ``W ← W + delta``. Its metadata is one JSON document under the key
``excise``. NumPy only: patching a served model needs no PyTorch.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from excise.editmetadata import FORMAT_VERSION, EditMetadata, Stream
from excise.errors import EditError, FingerprintMismatch, NumericsError
from excise.output import new_file

Array = npt.NDArray[Any]

#: A safetensors header beyond this is damage or an attack: the largest edit's is some hundred kilobytes.
_HEADER_LIMIT = 64 * 2**20


def fingerprint(weights: Mapping[str, Array]) -> str:
    """SHA-256 over the weights' names, shapes and float32 values, by name; the stored precision is irrelevant."""
    digest = hashlib.sha256()
    for name in sorted(weights):
        weight = np.ascontiguousarray(weights[name], dtype="<f4")
        digest.update(f"{name} {weight.shape}\n".encode())
        digest.update(weight.data)
    return digest.hexdigest()


@dataclass(frozen=True)
class Edit:
    """An edit, independent of any model.

    ``tensors`` are the file's arrays and ``metadata`` its document.
    """

    metadata: EditMetadata
    tensors: Mapping[str, Array]

    @cached_property
    def id(self) -> str:
        """SHA-256 over the metadata and the arrays, in hex: equal edits have equal ids on every machine."""
        digest = hashlib.sha256(self.metadata.model_dump_json().encode())
        for name in sorted(self.tensors):
            array = np.ascontiguousarray(self.tensors[name])
            digest.update(f"{name} {array.dtype.str} {array.shape}\n".encode())
            digest.update(array.data)
        return digest.hexdigest()

    @cached_property
    def sites(self) -> tuple[str, ...]:
        """Names of the weights that the edit moves, relative to its component, each once."""
        shared = [site for stream in self.metadata.streams for site in stream.sites]
        return tuple(dict.fromkeys([*shared, *self.metadata.deltas]))

    @property
    def summary(self) -> str:
        """One line for people."""
        pairs = [f"{c.erase!r} → {c.to!r}" for c in self.metadata.concepts]
        shown = ", ".join(pairs[:3]) + (f" and {len(pairs) - 3} more" if len(pairs) > 3 else "")
        return f"{self.metadata.method}: {shown or 'no concepts named'}; {self.metadata.kept.count} kept; " + (
            f"{len(self.sites)} weights"
        )

    def stream_of(self, site: str) -> Stream | None:
        """The stream that a site belongs to; None where it only has a delta."""
        return self._streams.get(site)

    def is_shared(self, stream: Stream) -> bool:
        """Whether one matrix stands for all of the stream's sites."""
        return f"{stream.name}.transform" in self.tensors

    def matrix(self, site: str) -> npt.NDArray[np.float64]:
        """The d × d matrix that multiplies this site's weight from the right, float64.

        Raises:
            EditError: the site isn't in any stream.
        """
        stream = self.stream_of(site)
        if stream is None:
            raise EditError(f"{site} has no transform in this edit: its weights move by a delta or not at all")
        if self.is_shared(stream):
            return np.asarray(self.tensors[f"{stream.name}.transform"], np.float64)
        row = stream.sites.index(site)
        product = np.eye(stream.dim)
        step = 0
        while (prefix := f"{stream.name}.steps.{step}.") + "shared" in self.tensors:
            factor = self.tensors[prefix + "shared"]
            if len(scaled := self.tensors[prefix + "scaled"]):
                factor = factor - np.tensordot(self.tensors[prefix + "scalars"][row], scaled, axes=1)
            product = product @ factor
            step += 1
        return product

    def check(self, weights: Mapping[str, Array], *, force: bool = False) -> None:
        """Raise ``FingerprintMismatch`` unless the edit was made for ``weights``.

        With ``force``, only what couldn't be applied at all is refused: a missing site, another shape.
        """
        missing = [site for site in self.sites if site not in weights]
        if missing:
            raise FingerprintMismatch(
                f"the edit is for another model: {missing[0]} and {len(missing) - 1} more not found"
            )
        for site in self.sites:
            shape, stream = weights[site].shape, self.stream_of(site)
            if stream is not None and (len(shape) != 2 or shape[1] != stream.dim):
                raise FingerprintMismatch(
                    f"the edit is for another model: {site} has shape {shape}, the edit is {stream.dim} wide"
                )
            delta = self.tensors.get(f"delta.{site}")
            if delta is not None and delta.shape != shape:
                raise FingerprintMismatch(
                    f"the edit is for another model: {site} has shape {shape}, the edit's is {delta.shape}"
                )
        if not force and fingerprint({s: weights[s] for s in self.sites}) != self.metadata.weights_fingerprint:
            raise FingerprintMismatch(
                "the edit was made for another model (its weights' fingerprint differs): "
                "make an edit for this one, or use --force"
            )

    def apply(self, weights: Mapping[str, Array], *, force: bool = False) -> dict[str, Array]:
        """The edited weights, each in its own dtype: ``W + W (T − I) + delta`` with ``T − I`` from float64.

        The product is in float32, or in float64 where the weight is that, and rounded once to anything narrower.

        Args:
            weights: every site's original weight with shape (o, d); other names are ignored.
            force: apply although the original weights aren't those that the edit was made for.

        Raises:
            FingerprintMismatch: a site is missing, has another shape, or (without ``force``) other values.
            NumericsError: an edited weight isn't finite in the weight's dtype.
        """
        self.check(weights, force=force)
        return {site: self.moved(site, weights[site]) for site in self.sites}

    def moved(self, site: str, weight: Array) -> Array:
        """One site's edited weight, as ``apply`` gives it, without its checks.

        Raises:
            NumericsError: the edited weight isn't finite in the weight's dtype.
        """
        dtype = np.dtype(np.float64 if weight.dtype == np.float64 else np.float32)
        with np.errstate(over="ignore", invalid="ignore"):
            original = weight.astype(dtype)
            new = original
            if (stream := self.stream_of(site)) is not None:
                new = original + original @ self._change(site, stream, dtype)
            if (delta := self.tensors.get(f"delta.{site}")) is not None:
                new = new + delta.astype(dtype)
            new = new.astype(weight.dtype)
        if not np.isfinite(new).all():
            raise NumericsError(f"{site} isn't finite after the edit in {weight.dtype}: use a larger --regularization")
        return new

    def _change(self, site: str, stream: Stream, dtype: np.dtype[Any]) -> Array:
        """``T_i − I``, formed once for a shared transform."""
        if not self.is_shared(stream):
            return (self.matrix(site) - np.eye(stream.dim)).astype(dtype)
        key = (stream.name, dtype.str)
        if key not in self._changes:
            self._changes[key] = (self.matrix(site) - np.eye(stream.dim)).astype(dtype)
        return self._changes[key]

    @cached_property
    def _streams(self) -> dict[str, Stream]:
        return {site: stream for stream in self.metadata.streams for site in stream.sites}

    @cached_property
    def _changes(self) -> dict[tuple[str, str], Array]:
        return {}


def save_edit(path: Path, edit: Edit) -> None:
    """Write an edit file; it appears whole or not at all.

    Raises:
        OutputError: ``path`` exists or can't be written.
    """
    with new_file(path) as partial:
        document = {"excise": edit.metadata.model_dump_json(), "excise_edit_id": edit.id, "format": "np"}
        save_file({name: np.ascontiguousarray(array) for name, array in edit.tensors.items()}, partial, document)


def load_edit(path: Path) -> Edit:
    """Read an edit file.

    Raises:
        EditError: missing, half-written, not an edit file, of an unknown format version, or altered.
    """
    if not path.is_file():
        raise EditError(f"{path} is not a file: name an edit file that excise edit wrote")
    try:
        with path.open("rb") as opened:
            if int.from_bytes(opened.read(8), "little") > _HEADER_LIMIT:
                raise EditError(f"{path} can't be read as safetensors (its header is too large): it is damaged")
        with safe_open(path, framework="np") as file:
            document = file.metadata() or {}
            if "excise" not in document:
                raise EditError(f"{path} has no excise metadata: it wasn't written by excise edit")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    except (SafetensorError, OSError) as error:
        raise EditError(f"{path} can't be read as safetensors ({error}): it is damaged or half-written") from error
    try:
        content = json.loads(document["excise"])
        version = content.get("format_version") if isinstance(content, dict) else None
        if version != FORMAT_VERSION:
            raise EditError(f"{path} has format version {version}, this excise reads {FORMAT_VERSION}: make it anew")
        metadata = EditMetadata.model_validate(content)
    except (json.JSONDecodeError, ValidationError) as error:
        raise EditError(f"{path} has unreadable metadata: {str(error).splitlines()[0]}") from error
    edit = Edit(metadata, tensors)
    if document.get("excise_edit_id") != edit.id:
        raise EditError(f"{path} was altered after it was written: its content doesn't match its id")
    return edit
