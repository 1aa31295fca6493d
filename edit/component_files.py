"""The files of one component of a model folder: its JSON, and its tensors by name, each read when it is asked for."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from excise.errors import ModelError

#: Names that a stored precision goes by in file names; the plain file comes first.
VARIANTS = (None, "fp16", "bf16")

#: Dtypes of a safetensors header that hold the numbers themselves; any other is a code that a quantiser reads.
PLAIN = ("F64", "F32", "F16", "BF16")

_SHARD = re.compile(r"[^/\\\0]+\.safetensors")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file of a model folder.

    Raises:
        ModelError: missing, not JSON, or not an object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ModelError(f"{path} is missing: the model folder is incomplete") from error
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{path} can't be read: {str(error).splitlines()[0]}") from error
    if not isinstance(content, dict):
        raise ModelError(f"{path} holds a JSON {type(content).__name__}, not an object: download it again")
    return content


def _single(component: Path, stem: str, variant: str | None) -> Path:
    return component / (f"{stem}.{variant}.safetensors" if variant else f"{stem}.safetensors")


def _index(component: Path, stem: str, variant: str | None) -> Path:
    return component / (f"{stem}.safetensors.index.{variant}.json" if variant else f"{stem}.safetensors.index.json")


def stored_variant(component: Path, stem: str) -> str | None:
    """The first of ``VARIANTS`` that the component has weights of, as ``from_pretrained`` calls it."""
    for variant in VARIANTS:
        if _index(component, stem, variant).exists() or _single(component, stem, variant).exists():
            return variant
    return None


def weight_files(component: Path, stem: str) -> list[Path]:
    """The safetensors files of a component, sharded or not.

    Raises:
        ModelError: none there, a shard is missing, or an index that isn't one.
    """
    variant = stored_variant(component, stem)
    index = _index(component, stem, variant)
    if index.exists():
        names = read_json(index).get("weight_map")
        # A shard lies beside its index: anything else would read outside the folder.
        if not isinstance(names, dict) or not all(_SHARD.fullmatch(str(name)) for name in names.values()):
            raise ModelError(f"{index} is damaged: its weight_map must name files beside it")
        files = sorted({component / name for name in names.values()})
    else:
        files = [_single(component, stem, variant)]
    for file in files:
        if not file.exists():
            raise ModelError(f"{file} is missing: the model folder is incomplete, or not in safetensors format")
    return files


class Tensors(Mapping[str, Tensor]):
    """The tensors of some safetensors files by name, in order of name; the values are read lazily.

    Raises:
        ModelError: a file that is damaged or half-written, when it is opened or read.
    """

    def __init__(self, files: list[Path]) -> None:
        #: The file of each tensor, open, and its name there.
        self._stored: dict[str, tuple[Path, Any, str]] = {}
        for file in files:
            try:
                opened: Any = safe_open(file, framework="pt")
                self._stored.update((name, (file, opened, name)) for name in opened.keys())  # noqa: SIM118 (no mapping)
            except (SafetensorError, OSError) as error:
                raise _damaged(file, error) from error

    @classmethod
    def joined(cls, parts: Mapping[str, Tensors]) -> Tensors:
        """Several components' tensors, each named ``component.name``."""
        tensors = cls([])
        for prefix, part in parts.items():
            tensors._stored.update((f"{prefix}.{name}", stored) for name, stored in part._stored.items())
        return tensors

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._stored))

    def __len__(self) -> int:
        return len(self._stored)

    def __getitem__(self, name: str) -> Tensor:
        file, opened, stored = self._stored[name]
        try:
            tensor: Tensor = opened.get_tensor(stored)
        except (SafetensorError, OSError, RuntimeError, AttributeError) as error:
            raise _damaged(file, error) from error
        return tensor

    def header(self, name: str) -> tuple[str, tuple[int, ...]]:
        """A tensor's dtype in the format's words ("F16", "BF16", "I8") and its shape; its values aren't read."""
        file, opened, stored = self._stored[name]
        try:
            part = opened.get_slice(stored)
            return str(part.get_dtype()), tuple(part.get_shape())
        except (SafetensorError, OSError) as error:
            raise _damaged(file, error) from error


def _damaged(file: Path, error: Exception) -> ModelError:
    reason = (str(error) or type(error).__name__).splitlines()[0]
    return ModelError(f"{file} can't be read ({reason}): it is damaged or half-written")


class Float32(Mapping[str, npt.NDArray[np.float32]]):
    """NumPy float32 copies (exact for float16 and bfloat16) of tensors, made one at a time when they are asked for."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = tensors

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def __getitem__(self, name: str) -> npt.NDArray[np.float32]:
        array: npt.NDArray[np.float32] = self._tensors[name].to(torch.float32).numpy()
        return array
