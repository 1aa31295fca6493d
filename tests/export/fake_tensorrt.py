"""A stand-in for the ``tensorrt`` module that records what it is asked: for machines without a GPU.

It has the object model's names and return values, as far as excise uses them, and no opinion on numbers.
"""

from __future__ import annotations

from enum import Enum, IntEnum
from typing import Any

import numpy as np

Severity = Enum("Severity", "INTERNAL_ERROR ERROR WARNING INFO VERBOSE")
BuilderFlag = Enum("BuilderFlag", "TF32 REFIT REFIT_IDENTICAL REFIT_INDIVIDUAL")
MemoryPoolType = Enum("MemoryPoolType", "WORKSPACE")


class NetworkDefinitionCreationFlag(IntEnum):
    STRONGLY_TYPED = 1


class DataType(Enum):
    FLOAT = 0
    HALF = 1
    INT64 = 2
    BF16 = 3


class ILogger:
    def __init__(self) -> None: ...


class IProgressMonitor:
    def __init__(self) -> None: ...


class Tensor:
    def __init__(self, name: str, dtype: DataType, shape: tuple[int, ...]) -> None:
        self.name, self.dtype, self.shape = name, dtype, shape


class Network:
    name = ""

    def __init__(self, module: FakeTensorRt) -> None:
        self.module, self.marked = module, list[str]()
        self.num_inputs = self.num_outputs = 1

    def get_input(self, index: int) -> Tensor:
        return Tensor("sample", DataType.HALF, (-1, 4))

    def get_output(self, index: int) -> Tensor:
        return Tensor("out_sample", DataType.BF16, (-1, 4))

    def mark_weights_refittable(self, name: str) -> bool:
        self.marked.append(name)
        return name not in self.module.unknown


class Config:
    builder_optimization_level = 3

    def __init__(self, module: FakeTensorRt) -> None:
        self.module = module
        self.flags = {BuilderFlag.TF32}
        self.profiles: list[dict[str, Any]] = []
        self.limits: dict[Any, int] = {}
        self.cache: bytes | None = None
        self.progress_monitor: Any = None

    def set_flag(self, flag: Any) -> None:
        self.flags.add(flag)

    def clear_flag(self, flag: Any) -> None:
        self.flags.discard(flag)

    def set_memory_pool_limit(self, pool: Any, size: int) -> None:
        self.limits[pool] = size

    def add_optimization_profile(self, profile: Profile) -> int:
        self.profiles.append(profile.shapes)
        return len(self.profiles) - 1

    def create_timing_cache(self, data: bytes) -> Any:
        if data and not data.startswith(b"times"):
            self.module.log("WARNING", "Failed to deserialize timing cache. Returning an empty timing cache.")
        return data

    def set_timing_cache(self, cache: bytes, ignore_mismatch: bool) -> bool:
        self.cache = cache
        return True

    def get_timing_cache(self) -> Any:
        class Cache:
            def serialize(inner) -> bytes:
                return b"times" + (self.cache or b"")

        return Cache()


class Profile:
    def __init__(self) -> None:
        self.shapes: dict[str, Any] = {}

    def set_shape(self, name: str, low: Any, best: Any, high: Any) -> None:
        self.shapes[name] = (low, best, high)


class Builder:
    def __init__(self, module: FakeTensorRt, logger: Any) -> None:
        self.module = module
        module.logger = logger

    def create_network(self, flags: int) -> Network:
        assert flags == 2, "strongly typed"
        self.module.network = Network(self.module)
        return self.module.network

    def create_builder_config(self) -> Config:
        self.module.config = Config(self.module)
        return self.module.config

    def create_optimization_profile(self) -> Profile:
        return Profile()

    def build_serialized_network(self, network: Network, config: Config) -> bytes | None:
        if self.module.build_error:
            self.module.log("ERROR", self.module.build_error)
            return None
        return b"plan of " + network.name.encode()


class Parser:
    def __init__(self, network: Network, logger: Any) -> None: ...

    def parse_from_file(self, path: str) -> bool:
        return True


class FakeTensorRt:
    """The module. ``unknown`` weights can't be marked; ``build_error`` is what a failing build logs."""

    __version__ = "10.0-fake"
    BuilderFlag, MemoryPoolType, IProgressMonitor, ILogger = BuilderFlag, MemoryPoolType, IProgressMonitor, ILogger
    NetworkDefinitionCreationFlag = NetworkDefinitionCreationFlag
    OnnxParser = Parser

    def __init__(self) -> None:
        self.unknown: set[str] = set()
        self.build_error = ""
        self.logger: Any = None
        self.network: Any = None
        self.config: Any = None
        self.refitter: Any = None

    def Builder(self, logger: Any) -> Builder:
        return Builder(self, logger)

    def Refitter(self, engine: Engine, logger: Any) -> Refitter:
        self.logger = logger
        self.refitter = Refitter(self, engine)
        return self.refitter

    @staticmethod
    def Weights(values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        return values

    def log(self, severity: str, message: str) -> None:
        self.logger.log(Severity[severity], message)


class Engine:
    """Holds weights; ``asks`` are further ones that it wants once any is set."""

    def __init__(self, weights: dict[str, Any], *, asks: tuple[str, ...] = (), fails: bool = False) -> None:
        self.weights, self.asks, self.fails = weights, asks, fails


class Refitter:
    """Records the calls; the engine has the new weights after ``refit_cuda_engine`` alone."""

    def __init__(self, module: FakeTensorRt, engine: Engine) -> None:
        self.module, self.engine = module, engine
        self.calls: list[tuple[str, ...]] = []
        self.new: dict[str, Any] = {}

    def get_all_weights(self) -> list[str]:
        return list(self.engine.weights)

    def set_named_weights(self, name: str, weights: Any) -> bool:
        self.calls.append(("set_named_weights", name))
        if self.engine.weights[name].dtype != weights.dtype:
            self.module.log("ERROR", f"{name} has another type")
            return False
        self.new[name] = weights
        return True

    def get_missing_weights(self) -> list[str]:
        self.calls.append(("get_missing_weights",))
        return list(self.engine.asks)

    def refit_cuda_engine(self) -> bool:
        self.calls.append(("refit_cuda_engine",))
        if self.engine.fails:
            self.module.log("ERROR", "no memory")
            return False
        self.engine.weights.update(self.new)
        return True
