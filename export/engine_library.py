"""TensorRT and TensorRT-RTX behind one interface: they share an object model.

The libraries return ``None`` or ``False`` and tell their logger why. One logger for each library lives as long as the
process, because a second one is ignored while anything that the first was given to is alive.
"""

from __future__ import annotations

import ctypes
import importlib
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Any, get_args

from excise.enginefile import LibraryName
from excise.errors import ArtefactError, ExciseError, MissingExtra, UsageError

#: What the command line calls a library, and its extra → the name of its module.
LIBRARIES: dict[str, LibraryName] = {name.replace("_", "-"): name for name in get_args(LibraryName)}

_KEPT = ("WARNING", "ERROR", "INTERNAL_ERROR")
#: Logged by every builder on a machine without a driver, where a build goes well all the same.
_NO_DRIVER = "catchCudaError"
#: CUDA's error for code that was compiled for a newer driver.
_PTX_TOO_NEW = "CUDA error 222"
_PLACE = re.compile(r"\s*In \S+ at \S+:\d+|\s*\(\s*\)")
_MAJOR, _MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR of cuda.h


@dataclass
class Heard:
    """What a library logged: errors and warnings, each on one line."""

    errors: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


class EngineLibrary:
    """A loaded ``tensorrt`` or ``tensorrt_rtx``.

    Attributes:
        name: The module's.
        module: The module itself.
        version: The library's own.
        logger: To be given to every object of the library that wants one.
    """

    def __init__(self, name: LibraryName, module: Any) -> None:
        self.name, self.module, self.version = name, module, str(module.__version__)
        self._heard = Heard()
        self.logger = _logger(module, self._heard)

    @contextmanager
    def listening(self) -> Iterator[Heard]:
        """Yield what is logged inside the block."""
        self._heard.errors.clear()
        self._heard.warnings.clear()
        yield self._heard

    def targets(self) -> tuple[str, ...]:
        """The compute capabilities that ``tensorrt_rtx`` can be told to build for; none of ``tensorrt``."""
        known = dir(getattr(self.module, "ComputeCapability", None))
        return tuple(sorted(name for name in known if name.startswith("SM")))

    def runs_on(self, gpu: str) -> bool:
        """Whether engines can run on a GPU, such as ``SM89``.

        ``tensorrt_rtx`` builds for Hopper without a word, and then opens no such engine there. Newer GPUs than it knows
        it serves.
        """
        known = self.targets()
        return not known or gpu in known or int(gpu[2:]) > max(int(name[2:]) for name in known)

    def failure(self, what: str, heard: Heard) -> ExciseError:
        """An error that says what failed and the library's last word on it.

        ``UsageError`` where the library blames its caller, ``ArtefactError`` otherwise.
        """
        told = [message for message in heard.errors if _NO_DRIVER not in message] or heard.errors
        reason = told[-1] if told else "it gave no reason"
        kind = UsageError if "API Usage Error" in reason else ArtefactError
        if _PTX_TOO_NEW in reason:
            reason += f"; the driver is older than the CUDA that {self.name} was built with: update it, or "
            reason += "install the package for an earlier CUDA, as tensorrt-rtx-cu12 is"
        return kind(f"{what}: {self.name} {self.version} says: {_PLACE.sub('', reason)}")


def _logger(module: Any, heard: Heard) -> Any:
    """A logger of the library that keeps errors and warnings."""

    class Logger(module.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            module.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            if severity.name in _KEPT:
                kept = heard.warnings if severity.name == "WARNING" else heard.errors
                kept.append(" ".join(message.split()))

    return Logger()


@cache
def load_library(name: str) -> EngineLibrary:
    """Import ``tensorrt`` or ``tensorrt_rtx``, which may be written with a hyphen.

    Raises:
        UsageError: Another name.
        MissingExtra: It isn't installed.
        ArtefactError: It is, and doesn't load.
    """
    extra = name.replace("_", "-")
    if extra not in LIBRARIES:
        raise UsageError(f"unknown engine library {name!r}: choose one of {', '.join(LIBRARIES)}")
    try:
        module = importlib.import_module(LIBRARIES[extra])
    except ModuleNotFoundError as error:
        raise MissingExtra(extra, extra) from error
    except (ImportError, OSError) as error:
        reason = " ".join(str(error).split())
        raise ArtefactError(f"{extra} is installed and doesn't load ({reason}): install it again") from error
    return EngineLibrary(LIBRARIES[extra], module)


def gpu_capability() -> str | None:
    """The first GPU's compute capability, such as ``SM89``; ``None`` without a GPU or its driver."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    device, major, minor = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
    if driver.cuInit(0) or driver.cuDeviceGet(ctypes.byref(device), 0):
        return None
    for value, attribute in ((major, _MAJOR), (minor, _MINOR)):
        if driver.cuDeviceGetAttribute(ctypes.byref(value), attribute, device):
            return None
    return f"SM{major.value}{minor.value}"
