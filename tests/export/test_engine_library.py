"""The two libraries behind one interface: what isn't installed, and what a library says when it fails."""

from __future__ import annotations

import ctypes
import importlib
import re
from typing import Any

import pytest

from excise.errors import ArtefactError, MissingExtra, UsageError
from excise.export.engine_library import EngineLibrary, gpu_capability, load_library
from tests.export.engines import needs_rtx
from tests.export.fake_tensorrt import FakeTensorRt

#: As in a new process.
load = load_library.__wrapped__


@pytest.mark.parametrize("name", ["tensorrt", "tensorrt-rtx", "tensorrt_rtx"])
def test_what_is_not_installed_is_named_with_its_extra(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(module: str) -> Any:
        raise ModuleNotFoundError(f"No module named {module!r}", name=module)

    monkeypatch.setattr(importlib, "import_module", missing)
    extra = name.replace("_", "-")
    with pytest.raises(MissingExtra, match=rf"{extra} isn't installed: pip install 'excise\[{extra}\]'"):
        load(name)


def test_what_does_not_load_is_another_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(module: str) -> Any:
        raise ImportError("libnvinfer.so.10: cannot open\nshared object file")

    monkeypatch.setattr(importlib, "import_module", broken)
    with pytest.raises(ArtefactError, match=r"doesn't load \(libnvinfer.so.10: cannot open shared object file\)"):
        load("tensorrt")


def test_other_names_are_refused() -> None:
    with pytest.raises(UsageError, match="unknown engine library 'openvino': choose one of tensorrt, tensorrt-rtx"):
        load("openvino")


def test_names_are_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def imported(name: str) -> Any:
        asked.append(name)
        return FakeTensorRt()

    monkeypatch.setattr(importlib, "import_module", imported)
    made = [load(name) for name in ("tensorrt", "tensorrt-rtx", "tensorrt_rtx")]
    assert asked == [one.name for one in made] == ["tensorrt", "tensorrt_rtx", "tensorrt_rtx"]
    assert {one.version for one in made} == {"10.0-fake"}


@needs_rtx
def test_a_library_is_loaded_once() -> None:
    assert load_library("tensorrt-rtx") is load_library("tensorrt-rtx")


def library() -> tuple[FakeTensorRt, EngineLibrary]:
    module = FakeTensorRt()
    made = EngineLibrary("tensorrt", module)
    module.logger = made.logger
    return module, made


def test_the_logger_hears_errors_and_warnings_of_its_block() -> None:
    module, made = library()
    module.log("ERROR", "before")
    with made.listening() as heard:
        for severity in ("VERBOSE", "INFO", "WARNING", "ERROR", "INTERNAL_ERROR"):
            module.log(severity, f"a {severity}\n  of two lines")
    assert heard.errors == ["a ERROR of two lines", "a INTERNAL_ERROR of two lines"]
    assert heard.warnings == ["a WARNING of two lines"]


NO_DRIVER = "[checkMacros.cpp::catchCudaError::250] Error Code 1: Cuda Runtime (In catchCudaError at /_src/x.cpp:250)"
USAGE = "IBuilder::f: Error Code 4: API Usage Error (sample is missing. In validate at /_src/api/network.cpp:4046)"
FAULT = "IBuilder::f: Error Code 1: Myelin (compile failed In g at /_src/y.cpp:9)"


@pytest.mark.parametrize(
    ("told", "kind", "message"),
    [
        ([USAGE], UsageError, "stop: tensorrt 10.0-fake says: IBuilder::f: Error Code 4: API Usage Error (sample is"),
        ([FAULT], ArtefactError, "stop: tensorrt 10.0-fake says: IBuilder::f: Error Code 1: Myelin (compile failed)"),
        ([USAGE, NO_DRIVER], UsageError, "sample is missing"),
        ([NO_DRIVER], ArtefactError, "Cuda Runtime"),
        ([], ArtefactError, "stop: tensorrt 10.0-fake says: it gave no reason"),
    ],
)
def test_a_failure_says_why(told: list[str], kind: type[Exception], message: str) -> None:
    module, made = library()
    with made.listening() as heard:
        for line in told:
            module.log("ERROR", line)
    error = made.failure("stop", heard)
    assert type(error) is kind
    assert re.search(re.escape(message), str(error))
    assert "/_src/" not in str(error)


def test_without_a_driver_there_is_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> Any:
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(ctypes, "CDLL", missing)
    assert gpu_capability() is None


@pytest.mark.parametrize(("init", "get", "expected"), [(0, 0, "SM89"), (100, 0, None), (0, 101, None)])
def test_the_drivers_answer_is_a_compute_capability(
    init: int, get: int, expected: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Driver:
        def cuInit(self, flags: int) -> int:
            return init

        def cuDeviceGet(self, device: Any, number: int) -> int:
            return get

        def cuDeviceGetAttribute(self, value: Any, attribute: int, device: Any) -> int:
            value._obj.value = {75: 8, 76: 9}[attribute]
            return 0

    monkeypatch.setattr(ctypes, "CDLL", lambda name: Driver())
    assert gpu_capability() == expected
