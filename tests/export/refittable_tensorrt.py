"""A stand-in for the ``tensorrt`` module whose engines hold real weights: built, opened, refitted and serialised.

``OnnxExecution`` runs such an engine: the ONNX file that it was built from, with the engine's weights in place.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from excise.export.engine_build import onnx_inputs
from excise.export.onnx_graph import Graph, load_graph
from tests.export.fake_tensorrt import Builder, Config, DataType, Engine, FakeTensorRt, Network, Refitter, Tensor

_DTYPES = {"float32": DataType.FLOAT, "float16": DataType.HALF, "int64": DataType.INT64}


class SerializationFlag(Enum):
    EXCLUDE_WEIGHTS = 0
    INCLUDE_REFIT = 2


class OnnxNetwork(Network):
    """Has the inputs of the ONNX file that the parser read."""

    path = Path()

    def read(self, path: Path) -> None:
        self.path = path
        inputs = onnx_inputs(load_graph(path))
        self.inputs = [Tensor(name, _DTYPES[one.dtype], one.shape) for name, one in inputs.items()]
        self.num_inputs = len(self.inputs)

    def get_input(self, index: int) -> Tensor:
        return self.inputs[index]


class OnnxParser:
    def __init__(self, network: OnnxNetwork, logger: Any) -> None:
        self.network = network

    def parse_from_file(self, path: str) -> bool:
        self.network.read(Path(path))
        return True


class OnnxBuilder(Builder):
    """A plan is an archive of the weights that were marked."""

    def create_network(self, flags: int) -> Network:
        self.module.network = OnnxNetwork(self.module)
        return self.module.network  # type: ignore[no-any-return]

    def build_serialized_network(self, network: Network, config: Config) -> bytes | None:
        assert isinstance(network, OnnxNetwork)
        graph = Graph(network.path)
        return archive({name: graph.values(name) for name in network.marked})


class OpenedEngine(Engine):
    """Keeps what it was opened with, to serialise that where ``module.forgets``."""

    def __init__(self, module: RefittableTensorRt, data: bytes) -> None:
        super().__init__(weights_of(data), asks=module.asks, fails=module.fails)
        self.module, self.data, self.refittable = module, data, module.opened == 1 or module.again

    def create_serialization_config(self) -> SerializationConfig:
        return SerializationConfig()

    def serialize_with_config(self, config: SerializationConfig) -> bytes | None:
        assert config.flags == {SerializationFlag.INCLUDE_REFIT}
        return self.data if self.module.forgets else archive(self.weights)


class SerializationConfig:
    def __init__(self) -> None:
        self.flags = {SerializationFlag.EXCLUDE_WEIGHTS}

    def clear_flag(self, flag: SerializationFlag) -> None:
        self.flags.discard(flag)

    def set_flag(self, flag: SerializationFlag) -> None:
        self.flags.add(flag)


class Runtime:
    def __init__(self, module: RefittableTensorRt) -> None:
        self.module = module

    def deserialize_cuda_engine(self, data: bytes) -> OpenedEngine | None:
        assert isinstance(data, bytes)
        self.module.opened += 1
        if self.module.opened == self.module.unopened:
            self.module.log("ERROR", "the plan is of another version")
            return None
        return OpenedEngine(self.module, data)


class KeepingRefitter(Refitter):
    """Says that it refitted all weights and leaves those of ``module.kept`` as they were."""

    def refit_cuda_engine(self) -> bool:
        self.new = {name: values for name, values in self.new.items() if name not in self.module.kept}  # type: ignore[attr-defined]
        return super().refit_cuda_engine()


class RefittableTensorRt(FakeTensorRt):
    """The module.

    ``kept`` weights aren't replaced by a refit; ``forgets`` serialises the engine without its new ones; ``again`` is
    whether a refitted engine can be refitted; ``asks`` and ``fails`` are ``Engine``'s; ``unopened`` is the number of
    the opening that fails.
    """

    OnnxParser = OnnxParser  # type: ignore[assignment]
    SerializationFlag: Any = SerializationFlag

    def __init__(self) -> None:
        super().__init__()
        self.kept: frozenset[str] = frozenset()
        self.asks: tuple[str, ...] = ()
        self.forgets = self.fails = False
        self.again = True
        self.opened = self.unopened = 0

    def Builder(self, logger: Any) -> Builder:
        return OnnxBuilder(self, logger)

    def Runtime(self, logger: Any) -> Runtime:
        self.logger, self.opened = logger, 0
        return Runtime(self)

    def Refitter(self, engine: Engine, logger: Any) -> Refitter:
        self.logger = logger
        self.refitter = KeepingRefitter(self, engine)
        return self.refitter  # type: ignore[no-any-return]


class OnnxExecution:
    """In place of ``EngineExecution``: ``onnx`` on the CPU, with the engine's weights."""

    onnx = Path()

    def __init__(self, engine: OpenedEngine, library: Any) -> None:
        options = onnxruntime.SessionOptions()
        values = [onnxruntime.OrtValue.ortvalue_from_numpy(array) for array in engine.weights.values()]
        options.add_external_initializers(list(engine.weights), values)
        self.session = onnxruntime.InferenceSession(str(self.onnx), options, providers=["CPUExecutionProvider"])

    def __call__(self, feed: Mapping[str, NDArray[Any]]) -> NDArray[np.float32]:
        return np.asarray(self.session.run(None, dict(feed))[0], np.float32)


def archive(weights: Mapping[str, NDArray[Any]]) -> bytes:
    """Weights as a plan; equal weights give equal plans."""
    stream = io.BytesIO()
    np.savez(stream, **dict(sorted(weights.items())))
    return stream.getvalue()


def weights_of(data: bytes) -> dict[str, NDArray[Any]]:
    """The weights that a plan holds."""
    with np.load(io.BytesIO(data)) as loaded:
        return dict(loaded)
