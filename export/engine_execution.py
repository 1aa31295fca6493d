"""A built engine on the GPU: opened, run, and serialised again. PyTorch's CUDA tensors are its memory."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from excise.errors import ArtefactError, MissingExtra, UsageError
from excise.export.engine_library import EngineLibrary

DEVICE = "cuda"
#: A type in the library's words → in PyTorch's.
_DTYPES = {"FLOAT": "float32", "HALF": "float16", "BF16": "bfloat16", "INT32": "int32", "INT64": "int64"}


def check_execution() -> None:
    """Whether engines can be run here.

    Raises:
        MissingExtra: PyTorch isn't installed.
        UsageError: It has no GPU.
    """
    try:
        import torch
    except ModuleNotFoundError as error:
        raise MissingExtra("torch", "export") from error
    if not torch.cuda.is_available():
        raise UsageError(
            f"PyTorch {torch.__version__}, whose memory the engine is run in, finds no GPU: install its build for CUDA"
        )


def open_engine(runtime: Any, data: bytes, library: EngineLibrary) -> Any:
    """A serialised engine, deserialised by a runtime that has to live as long.

    Raises:
        ArtefactError, UsageError: The library refuses it, for its reason.
    """
    with library.listening() as heard:
        engine = runtime.deserialize_cuda_engine(data)
        if engine is None:
            raise library.failure("the engine can't be opened", heard)
    return engine


def serialized(engine: Any, library: EngineLibrary) -> bytes:
    """The engine with its present weights, as refittable as it was.

    ``INCLUDE_REFIT`` isn't among the library's default flags: without it an engine can be refitted once.

    Raises:
        ArtefactError, UsageError: The library fails, for its reason.
    """
    flags = library.module.SerializationFlag
    with library.listening() as heard:
        config = engine.create_serialization_config()
        config.clear_flag(flags.EXCLUDE_WEIGHTS)
        config.set_flag(flags.INCLUDE_REFIT)
        data = engine.serialize_with_config(config)
        if data is None:
            raise library.failure("the engine can't be serialised", heard)
    return bytes(data)


class EngineExecution:
    """Runs an open engine on the first GPU, by its first profile.

    While it lives, the engine can't be refitted.

    Raises:
        ArtefactError, UsageError: The engine can't be run, for the library's reason.
    """

    def __init__(self, engine: Any, library: EngineLibrary) -> None:
        self._engine, self._library = engine, library
        with library.listening() as heard:
            self._context = engine.create_execution_context()
            if self._context is None:
                raise library.failure("the engine can't be run", heard)

    def __call__(self, feed: Mapping[str, NDArray[Any]]) -> NDArray[np.float32]:
        """The engine's first output, as float32.

        Args:
            feed: Every input by its name, each in the engine's shape; cast to the engine's type.

        Raises:
            ArtefactError: An input is missing or unknown, or its type isn't known here.
            ArtefactError, UsageError: The run fails, for the library's reason.
        """
        import torch

        outputs = self._outputs(feed)
        with self._library.listening() as heard:
            tensors = {name: torch.from_numpy(values).to(DEVICE, self._dtype(name)) for name, values in feed.items()}
            for name, tensor in tensors.items():
                if not self._context.set_input_shape(name, tuple(tensor.shape)):
                    raise self._library.failure(f"the engine doesn't take {name} of {tuple(tensor.shape)}", heard)
            for name in outputs:
                shape = tuple(self._context.get_tensor_shape(name))
                tensors[name] = torch.empty(shape, dtype=self._dtype(name), device=DEVICE)
            for name, tensor in tensors.items():
                self._context.set_tensor_address(name, tensor.data_ptr())
            torch.cuda.synchronize()
            stream: Any = torch.cuda.Stream()  # type: ignore[no-untyped-call]
            if not self._context.execute_async_v3(stream.cuda_stream):
                raise self._library.failure("the engine's run failed", heard)
            stream.synchronize()
        result: NDArray[np.float32] = tensors[outputs[0]].float().cpu().numpy()
        return result

    def _outputs(self, feed: Mapping[str, NDArray[Any]]) -> list[str]:
        """Names of the engine's outputs, in its order; every other tensor of it is in ``feed``."""
        mode = self._library.module.TensorIOMode
        names = [self._engine.get_tensor_name(index) for index in range(self._engine.num_io_tensors)]
        outputs = [name for name in names if self._engine.get_tensor_mode(name) == mode.OUTPUT]
        if other := sorted(set(names) - set(outputs) ^ set(feed)):
            raise ArtefactError(
                f"the engine takes {', '.join(sorted(set(names) - set(outputs)))}, and {other[0]} is one too many or "
                "too few: its JSON is of another engine; build it again"
            )
        return outputs

    def _dtype(self, name: str) -> Any:
        """PyTorch's type of a tensor of the engine."""
        import torch

        dtype = self._engine.get_tensor_dtype(name).name
        if dtype not in _DTYPES:
            raise ArtefactError(f"the engine has {name} in {dtype}, which isn't run here: {', '.join(_DTYPES)} are")
        return getattr(torch, _DTYPES[dtype])
