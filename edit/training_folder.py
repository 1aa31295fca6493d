"""The folder of a training: what it takes to go on after a stop.

    training.json               whose it is: method, recipe, concepts, and fingerprints of the model
    state.safetensors           weights, the optimiser's state, and as metadata the iteration and the losses
    NAME-000008.safetensors     images that the original model drew; fisher.safetensors: SA's Fisher information

Every file takes its place in one step: after a kill at any moment, each is the old one or the new one.
"""

from __future__ import annotations

import errno
import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from excise.errors import OutputError, UsageError
from excise.output import PARTIAL

_IDENTITY = "training.json"


class TrainingFolder:
    """A folder of one training, made where it isn't there.

    Args:
        path: the folder.
        identity: plain data that tells one training from another.

    Raises:
        OutputError: it holds something else, is damaged, or can't be written.
        UsageError: it is another training's; the message names the first difference.
    """

    def __init__(self, path: Path, identity: Mapping[str, Any]) -> None:
        self.path = path
        document = json.loads(json.dumps(identity))
        try:
            path.mkdir(parents=True, exist_ok=True)
            if (path / _IDENTITY).exists():
                self._check(document)
            elif any(not file.name.startswith(PARTIAL) for file in path.iterdir()):
                raise OutputError(f"{path} holds something else than a training: name another with --checkpoints")
            else:
                partial = path / f"{PARTIAL}{_IDENTITY}"
                partial.write_text(json.dumps(document, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
                os.replace(partial, path / _IDENTITY)
        except OSError as error:
            raise _unwritable(path, error) from error

    def forget_if_empty(self) -> None:
        """Remove the folder where it says no more than whose it is: it would refuse the recipe put right."""
        if [file.name for file in self.path.iterdir()] == [_IDENTITY]:
            (self.path / _IDENTITY).unlink()
            self.path.rmdir()

    def _check(self, document: Mapping[str, Any]) -> None:
        try:
            found = json.loads((self.path / _IDENTITY).read_text(encoding="utf-8"))
            there = _flat(found)
        except (ValueError, AttributeError) as error:
            raise OutputError(f"{self.path / _IDENTITY} can't be read: remove {self.path}") from error
        here = _flat(document)
        for name in [*here, *there]:
            if there.get(name) != here.get(name):
                raise UsageError(
                    f"{self.path} holds another training ({name} is {_shown(there.get(name))} there, "
                    f"{_shown(here.get(name))} here): name another folder with --checkpoints, or remove it"
                )

    def read(self, name: str) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """Tensors on the CPU and the document beside them; None where there are none.

        Raises:
            OutputError: damaged.
        """
        path = self.path / f"{name}.safetensors"
        if not path.exists():
            return None
        try:
            with safe_open(path, framework="pt") as file:
                document = json.loads((file.metadata() or {})["document"])
                return {key: file.get_tensor(key) for key in file.keys()}, document  # noqa: SIM118 (not a mapping)
        except (SafetensorError, OSError, KeyError, ValueError) as error:
            raise OutputError(
                f"{path} can't be read, it is damaged: remove it, and what it holds is made anew"
            ) from error

    def write(self, name: str, tensors: Mapping[str, Tensor], document: Mapping[str, Any]) -> None:
        """Put tensors and a document in place of those of the same name, in one step.

        Raises:
            OutputError: it can't be written, or the disk is full; what was there is there still.
        """
        plain = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
        partial: Path | None = None
        try:
            handle, temporary = tempfile.mkstemp(prefix=PARTIAL, dir=self.path)
            os.close(handle)
            partial = Path(temporary)
            save_file(plain, partial, {"document": json.dumps(document)})
            os.replace(partial, self.path / f"{name}.safetensors")
        except (OSError, SafetensorError) as error:
            raise _unwritable(self.path, error) from error
        finally:
            if partial is not None:
                partial.unlink(missing_ok=True)


def _unwritable(path: Path, error: Exception) -> OutputError:
    number = getattr(error, "errno", None)
    # safetensors gives the operating system's error as text alone.
    full = number in (errno.ENOSPC, errno.EDQUOT) or "os error 28" in str(error)
    reason = "no space left on the disk" if full else getattr(error, "strerror", None) or str(error).splitlines()[0]
    return OutputError(f"{path} can't be written ({reason}): make room, or name another folder with --checkpoints")


def _flat(document: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Values by dotted name."""
    flat: dict[str, Any] = {}
    for key, value in document.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def _shown(value: object) -> str:
    text = "absent" if value is None else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 40 else text[:37] + "..."
