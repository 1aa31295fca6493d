"""An engine's run, by a stand-in for the library's context that reads and writes the memory that it is given."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from enum import Enum
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from excise.errors import ArtefactError, UsageError
from excise.export import engine_execution
from excise.export.engine_execution import EngineExecution, check_execution, open_engine, serialized
from excise.export.engine_library import EngineLibrary
from tests.export.fake_tensorrt import FakeTensorRt

TensorIOMode = Enum("TensorIOMode", "NONE INPUT OUTPUT")
FEED = {"sample": np.arange(6, dtype=np.float32).reshape(2, 3), "timestep": np.array(5.0, np.float32)}


class Context:
    """Computes sample + timestep in float32, in two outputs, the second negated."""

    def __init__(self, module: Any, *, refuses: str = "", fails: bool = False) -> None:
        self.module, self.refuses, self.fails = module, refuses, fails
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self.shapes[name] = shape
        return name != self.refuses

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return self.shapes["sample"]

    def set_tensor_address(self, name: str, address: int) -> None:
        self.addresses[name] = address

    def execute_async_v3(self, stream: int) -> bool:
        if self.fails:
            self.module.log("ERROR", "illegal memory access")
            return False
        count = int(np.prod(self.shapes["sample"]))
        sample = self._memory("sample", count)
        for name, sign in (("out_sample", 1), ("other", -1)):
            self._memory(name, count)[:] = sign * (sample + self._memory("timestep", 1))
        return True

    def _memory(self, name: str, count: int) -> Any:
        return np.ctypeslib.as_array((ctypes.c_float * count).from_address(self.addresses[name]))


class Engine:
    """``refuses`` and ``fails`` are its context's; it has none where ``context`` is False."""

    names = ("sample", "timestep", "out_sample", "other")
    num_io_tensors = len(names)

    def __init__(self, module: Any, *, context: bool = True, dtype: str = "FLOAT", **options: Any) -> None:
        self.module, self.dtype = module, dtype
        self.context = Context(module, **options) if context else None

    def create_execution_context(self) -> Context | None:
        return self.context

    def get_tensor_name(self, index: int) -> str:
        return self.names[index]

    def get_tensor_mode(self, name: str) -> Any:
        return TensorIOMode.OUTPUT if name in self.names[2:] else TensorIOMode.INPUT

    def get_tensor_dtype(self, name: str) -> Any:
        return SimpleNamespace(name=self.dtype)

    def create_serialization_config(self) -> Any:
        return SimpleNamespace(clear_flag=lambda flag: True, set_flag=lambda flag: True)

    def serialize_with_config(self, config: Any) -> None:
        return None


@pytest.fixture
def library() -> EngineLibrary:
    module: Any = FakeTensorRt()
    module.TensorIOMode = TensorIOMode
    module.SerializationFlag = Enum("SerializationFlag", "EXCLUDE_WEIGHTS INCLUDE_REFIT")
    made = EngineLibrary("tensorrt", module)
    module.logger = made.logger
    return made


@pytest.fixture
def on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch's tensors on the CPU and no streams."""
    monkeypatch.setattr(engine_execution, "DEVICE", "cpu")
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "Stream", lambda: SimpleNamespace(cuda_stream=0, synchronize=lambda: None))


@pytest.mark.usefixtures("on_the_cpu")
def test_the_first_output_comes_back(library: EngineLibrary) -> None:
    engine = Engine(library.module)
    found = EngineExecution(engine, library)(FEED)
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, FEED["sample"] + 5)
    assert engine.context is not None
    assert engine.context.shapes == {"sample": (2, 3), "timestep": ()}


@pytest.mark.usefixtures("on_the_cpu")
def test_an_input_is_cast_to_the_engines_type(library: EngineLibrary) -> None:
    feed = {name: array.astype(np.float16) for name, array in FEED.items()}
    np.testing.assert_array_equal(EngineExecution(Engine(library.module), library)(feed), FEED["sample"] + 5)


@pytest.mark.usefixtures("on_the_cpu")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"refuses": "timestep"},
            r"the engine doesn't take timestep of \(\): tensorrt 10.0-fake says: it gave no reason",
        ),
        ({"fails": True}, "the engine's run failed: tensorrt 10.0-fake says: illegal memory access"),
        ({"dtype": "FP8"}, "has sample in FP8, which isn't run here"),
        ({"context": False}, "the engine can't be run: tensorrt 10.0-fake says"),
    ],
)
def test_a_run_that_fails_is_an_error(options: dict[str, Any], message: str, library: EngineLibrary) -> None:
    with pytest.raises(ArtefactError, match=message):
        EngineExecution(Engine(library.module, **options), library)(FEED)


@pytest.mark.parametrize(
    ("change", "name"), [(lambda feed: feed.pop("sample"), "sample"), (lambda feed: feed.update(mask=1), "mask")]
)
def test_other_inputs_are_refused(change: Callable[[Any], None], name: str, library: EngineLibrary) -> None:
    feed = dict(FEED)
    change(feed)
    with pytest.raises(ArtefactError, match=f"takes sample, timestep, and {name} is one too many or too few"):
        EngineExecution(Engine(library.module), library)(feed)


def test_an_engine_that_does_not_open_or_serialise_is_an_error(library: EngineLibrary) -> None:
    runtime = SimpleNamespace(deserialize_cuda_engine=lambda data: None)
    with pytest.raises(ArtefactError, match=r"the engine can't be opened: tensorrt 10.0-fake says"):
        open_engine(runtime, b"", library)
    with pytest.raises(ArtefactError, match=r"the engine can't be serialised: tensorrt 10.0-fake says"):
        serialized(Engine(library.module), library)


def test_a_pytorch_without_a_gpu_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UsageError, match="finds no GPU: install its build for CUDA"):
        check_execution()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    check_execution()
