"""The edit file: what an edit does to a model's weights, without the model.

A ``*.safetensors`` file. For an edit shared by all layers it holds ``transform`` (d × d, float64) and the exact
low-rank factors ``left`` (d × r) and ``right`` (r × d) of ``transform − I``. For a layer-wise one (technique
``tensor``) it holds, for each step s, ``steps.<s>.shared`` (d × d), ``steps.<s>.scaled`` (k × d × d) and
``steps.<s>.scalars`` (sites × k): ``W_i ← W_i (shared − Σ_k scalars[i, k] scaled[k])``. Its metadata is one JSON
document under the key ``excise``. NumPy only: patching a served model needs no PyTorch.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from excise.errors import EditError, FingerprintMismatch, NumericsError
from excise.output import new_file

FORMAT_VERSION: Final = 1

Array = npt.NDArray[Any]


class Erased(BaseModel):
    """One concept and what it is turned into."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    erase: str
    to: str


class EditMetadata(BaseModel):
    """Everything that made the edit, as stored in the file."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    format_version: Literal[1] = FORMAT_VERSION
    excise_version: str
    method: str
    preset: str | None
    hyperparameters: dict[str, float | int | str]
    concepts: tuple[Erased, ...]
    kept: tuple[str, ...]
    token_rule: str
    sites: tuple[str, ...]
    weights_fingerprint: str
    text_encoder_fingerprint: str
    residuals: tuple[float, ...] = ()


def fingerprint(weights: Mapping[str, Array]) -> str:
    """SHA-256 over the weights' names, shapes and float32 values, by name; the stored precision is irrelevant."""
    digest = hashlib.sha256()
    for name in sorted(weights):
        weight = np.ascontiguousarray(weights[name], dtype="<f4")
        digest.update(f"{name} {weight.shape}\n".encode())
        digest.update(weight.tobytes())
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
            digest.update(array.tobytes())
        return digest.hexdigest()

    @property
    def sites(self) -> tuple[str, ...]:
        """Names of the weights that the edit moves, relative to the UNet."""
        return self.metadata.sites

    @property
    def summary(self) -> str:
        """One line for people."""
        pairs = [f"{c.erase!r} → {c.to!r}" for c in self.metadata.concepts]
        shown = ", ".join(pairs[:3]) + (f" and {len(pairs) - 3} more" if len(pairs) > 3 else "")
        return f"{self.metadata.method}: {shown}; {len(self.metadata.kept)} kept; {len(self.sites)} weights"

    @property
    def dim(self) -> int:
        """Width d of the text embeddings."""
        name = "transform" if "transform" in self.tensors else "steps.0.shared"
        return int(self.tensors[name].shape[0])

    def matrix(self, site: str) -> npt.NDArray[np.float64]:
        """The d × d matrix that multiplies this site's weight from the right, float64."""
        if "transform" in self.tensors:
            return np.asarray(self.tensors["transform"], np.float64)
        row = self.sites.index(site)
        product = np.eye(self.dim)
        step = 0
        while f"steps.{step}.shared" in self.tensors:
            factor = self.tensors[f"steps.{step}.shared"]
            if len(scaled := self.tensors[f"steps.{step}.scaled"]):
                factor = factor - np.tensordot(self.tensors[f"steps.{step}.scalars"][row], scaled, axes=1)
            product = product @ factor
            step += 1
        return product

    def apply(self, weights: Mapping[str, Array], *, force: bool = False) -> dict[str, Array]:
        """The edited weights, each in its own dtype: ``W + W (T − I)`` with ``T − I`` from float64.

        The product is in float32, or in float64 where the weight is that, and rounded once to anything narrower.

        Args:
            weights: every site's original weight with shape (o, d); other names are ignored.
            force: apply although the original weights aren't those that the edit was made for.

        Raises:
            FingerprintMismatch: a site is missing, has another width, or (without ``force``) other values.
            NumericsError: an edited weight isn't finite in the weight's dtype.
        """
        missing = [site for site in self.sites if site not in weights]
        if missing:
            raise FingerprintMismatch(
                f"the edit is for another model: {missing[0]} and {len(missing) - 1} more not found"
            )
        originals = {site: weights[site] for site in self.sites}
        for site, weight in originals.items():
            if weight.ndim != 2 or weight.shape[1] != self.dim:
                raise FingerprintMismatch(
                    f"the edit is for another model: {site} has shape {weight.shape}, the edit is {self.dim} wide"
                )
        if not force and fingerprint(originals) != self.metadata.weights_fingerprint:
            raise FingerprintMismatch(
                "the edit was made for another model (its weights' fingerprint differs): "
                "make an edit for this one, or use --force"
            )
        edited = {}
        change = np.empty((0, 0))
        for site, weight in originals.items():
            if "transform" not in self.tensors or not change.size:
                change = self.matrix(site) - np.eye(self.dim)
            dtype = np.float64 if weight.dtype == np.float64 else np.float32
            with np.errstate(over="ignore", invalid="ignore"):
                original = weight.astype(dtype)
                new = (original + original @ change.astype(dtype)).astype(weight.dtype)
            if not np.isfinite(new).all():
                raise NumericsError(
                    f"{site} isn't finite after the edit in {weight.dtype}: use a larger --regularization"
                )
            edited[site] = new
        return edited


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
        with safe_open(path, framework="np") as file:
            document = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    except (SafetensorError, OSError) as error:
        raise EditError(f"{path} can't be read as safetensors ({error}): it is damaged or half-written") from error
    if "excise" not in document:
        raise EditError(f"{path} has no excise metadata: it wasn't written by excise edit")
    try:
        content = json.loads(document["excise"])
        if content.get("format_version") != FORMAT_VERSION:
            raise EditError(
                f"{path} has format version {content.get('format_version')}, this excise reads {FORMAT_VERSION}"
            )
        metadata = EditMetadata.model_validate(content)
    except (json.JSONDecodeError, ValidationError) as error:
        raise EditError(f"{path} has unreadable metadata: {str(error).splitlines()[0]}") from error
    edit = Edit(metadata, tensors)
    if document.get("excise_edit_id") != edit.id:
        raise EditError(f"{path} was altered after it was written: its content doesn't match its id")
    return edit
