"""Triton's ``triton_python_backend_utils``, as far as a model uses it, without Triton."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from enum import Enum
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np

TRITONSERVER_RESPONSE_COMPLETE_FINAL = 1
TRITONSERVER_MEMORY_CPU = 0


class TritonModelException(Exception):
    """What a model raises to say why it can't be loaded."""


class TritonError:
    """An error as an answer."""

    class Code(Enum):
        """Triton's error codes, the ones that are used."""

        INTERNAL = 1
        INVALID_ARG = 3
        UNAVAILABLE = 4
        CANCELLED = 7

    INTERNAL, INVALID_ARG, UNAVAILABLE, CANCELLED = Code

    def __init__(self, message: str, code: Code = Code.INTERNAL) -> None:
        self._message, self._code = message, code

    def message(self) -> str:
        return self._message

    def code(self) -> Code:
        return self._code


class Tensor:
    """A named array."""

    def __init__(self, name: str, values: np.ndarray[Any, Any]) -> None:
        assert values.flags["C_CONTIGUOUS"], f"Triton copies {name} as it lies"
        self._name, self._values = name, values

    def name(self) -> str:
        return self._name

    def as_numpy(self) -> np.ndarray[Any, Any]:
        return self._values


class InferenceResponse:
    """Tensors, or an error."""

    def __init__(self, output_tensors: Sequence[Tensor], error: TritonError | None = None) -> None:
        self.tensors, self._error = {one.name(): one for one in output_tensors}, error

    def has_error(self) -> bool:
        return self._error is not None

    def error(self) -> TritonError | None:
        return self._error


class Request:
    """What ``execute`` is given. ``cancel_after`` calls of ``is_cancelled`` say no, and the next ones yes."""

    def __init__(
        self,
        tensors: Mapping[str, Any],
        *,
        parameters: Mapping[str, Any] | None = None,
        cancel_after: int | None = None,
    ) -> None:
        dtypes = {"SEED": np.int64, "NUM_INFERENCE_STEPS": np.int32, "GUIDANCE_SCALE": np.float32}
        self.tensors = {
            name: Tensor(
                name,
                value
                if isinstance(value, np.ndarray)
                else np.array(
                    [[one.encode() if isinstance(one, str) else one] for one in value], dtypes.get(name, object)
                ),
            )
            for name, value in tensors.items()
        }
        self._parameters, self._cancel_after = json.dumps(parameters or {}), cancel_after
        self.sent: list[tuple[InferenceResponse, int]] = []

    def parameters(self) -> str:
        return self._parameters

    def is_cancelled(self) -> bool:
        if self._cancel_after is None:
            return False
        self._cancel_after -= 1
        return self._cancel_after < 0

    def get_response_sender(self) -> Any:
        def send(response: InferenceResponse, flags: int = 0) -> None:
            self.sent.append((response, flags))

        return SimpleNamespace(send=send, is_cancelled=self.is_cancelled)


def get_input_tensor_by_name(request: Request, name: str) -> Tensor | None:
    return request.tensors.get(name)


def get_output_tensor_by_name(response: InferenceResponse, name: str) -> Tensor | None:
    return response.tensors.get(name)


class Metric:
    """One value."""

    def __init__(self, labels: Mapping[str, str]) -> None:
        self.labels, self.value = dict(labels), 0.0

    def set(self, value: float) -> None:
        self.value = value

    def increment(self, by: float) -> None:
        self.value += by


class MetricFamily:
    """Values of one name; ``made`` holds them by it, and by ``NAME{REASON}`` where they differ by a reason."""

    COUNTER, GAUGE = "counter", "gauge"
    made: ClassVar[dict[str, Metric]] = {}

    def __init__(self, *, name: str, description: str, kind: str) -> None:
        self._name = name
        assert description
        assert kind in (self.COUNTER, self.GAUGE)

    def Metric(self, *, labels: Mapping[str, str]) -> Metric:
        name = f"{self._name}{{{labels['reason']}}}" if "reason" in labels else self._name
        self.made[name] = Metric(labels)
        return self.made[name]


class Logger:
    """Lines of the server's log."""

    lines: ClassVar[list[str]] = []

    @classmethod
    def log_warn(cls, line: str) -> None:
        cls.lines.append(line)

    log_error = log_warn


class PreferredMemory:
    """Where the answer is to be."""

    def __init__(self, kind: int, device: int) -> None:
        assert (kind, device) == (TRITONSERVER_MEMORY_CPU, 0)


class InferenceRequest:
    """A call of another model: ``models`` are functions from tensors by name to an array, by (model, version)."""

    models: ClassVar[dict[tuple[str, int], Callable[..., np.ndarray[Any, Any]]]] = {}
    allowed = False  #: only while a model executes

    def __init__(
        self,
        *,
        model_name: str,
        model_version: int,
        requested_output_names: Sequence[str],
        inputs: Sequence[Tensor],
        preferred_memory: PreferredMemory,
    ) -> None:
        assert isinstance(preferred_memory, PreferredMemory)
        self._model, self._output, self._inputs = (model_name, model_version), requested_output_names[0], inputs

    def exec(self) -> InferenceResponse:
        if not type(self).allowed:
            raise RuntimeError("BLS is only supported during the 'execute' function.")
        try:
            result = self.models[self._model](**{one.name(): one.as_numpy() for one in self._inputs})
        except Exception as error:
            return InferenceResponse([], TritonError(str(error)))
        return InferenceResponse([Tensor(self._output, result)])


def initialize_args(version: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """What Triton hands to ``initialize`` for the version folder ``version``."""
    return {
        "model_config": json.dumps(config),
        "model_name": version.parent.name,
        "model_version": version.name,
        "model_repository": str(version.parent),
        "model_instance_name": f"{version.parent.name}_0_0",
        "model_instance_kind": "CPU",
        "model_instance_device_id": "0",
    }
