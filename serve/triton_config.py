"""Triton's model configuration as data, with the names of its schema (``model_config.proto``), and as ``config.pbtxt``.

A field that may be left out has Triton's own default, and is written only where it has another value.
"""

from __future__ import annotations

from typing import Annotated, Literal, get_origin

from pydantic import BaseModel, ConfigDict, Field

from excise.serve.pbtxt import Message, Word, write

DataType = Literal[
    "TYPE_BOOL",
    "TYPE_UINT8",
    "TYPE_INT8",
    "TYPE_INT16",
    "TYPE_INT32",
    "TYPE_INT64",
    "TYPE_FP16",
    "TYPE_FP32",
    "TYPE_FP64",
    "TYPE_STRING",
]

#: NumPy's name of a dtype → Triton's.
DATA_TYPES: dict[str, DataType] = {
    "bool": "TYPE_BOOL",
    "uint8": "TYPE_UINT8",
    "int8": "TYPE_INT8",
    "int16": "TYPE_INT16",
    "int32": "TYPE_INT32",
    "int64": "TYPE_INT64",
    "float16": "TYPE_FP16",
    "float32": "TYPE_FP32",
    "float64": "TYPE_FP64",
    "str": "TYPE_STRING",
}

Count = Annotated[int, Field(ge=0)]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)

    def message(self) -> Message:
        """The fields that are set, in the schema's words."""
        found: list[tuple[str, str | Word | int | float | bool | Message]] = []
        for name, field in type(self).model_fields.items():
            value = getattr(self, name)
            if value is None or (not field.is_required() and value == field.default):
                continue
            enumerated = get_origin(field.annotation) is Literal
            if isinstance(value, dict):
                entries = [Message((("key", key), ("value", _written(one)))) for key, one in value.items()]
                found += [(field.alias or name, entry) for entry in entries]
            elif isinstance(value, tuple):
                found += [(field.alias or name, _written(one)) for one in value]
            else:
                found.append((field.alias or name, Word(value) if enumerated else _written(value)))
        return Message(tuple(found))


def _written(value: object) -> str | Word | int | float | bool | Message:
    if isinstance(value, _Part):
        return value.message()
    if isinstance(value, str | int | float | bool):
        return value
    raise TypeError(f"{value!r} has no place in a config.pbtxt")  # a mistake in this file


class Reshape(_Part):
    """The shape that the backend sees in place of ``dims``; empty for a tensor without dimensions."""

    shape: tuple[int, ...] = ()


class Input(_Part):
    """An input; ``dims`` leave the batch out where ``max_batch_size`` isn't 0."""

    name: str
    data_type: DataType
    dims: tuple[int, ...]
    reshape: Reshape | None = None
    optional: bool = False


class Output(_Part):
    """An output; ``dims`` as for an input."""

    name: str
    data_type: DataType
    dims: tuple[int, ...]
    reshape: Reshape | None = None


class Specific(_Part):
    """The versions that are loaded."""

    versions: tuple[Annotated[int, Field(ge=1)], ...] = Field(min_length=1)


class Latest(_Part):
    """How many of the newest versions are loaded."""

    num_versions: int = Field(ge=1)


class VersionPolicy(_Part):
    """One of the two; neither is Triton's default, the newest version."""

    latest: Latest | None = None
    specific: Specific | None = None


class QueuePolicy(_Part):
    """What happens to requests that wait: microseconds and a number of requests, 0 for no limit."""

    timeout_action: Literal["REJECT", "DELAY"] = "REJECT"
    default_timeout_microseconds: Count = 0
    allow_timeout_override: bool = False
    max_queue_size: Count = 0


class DynamicBatching(_Part):
    """Requests that wait are given to the model together."""

    preferred_batch_size: tuple[Annotated[int, Field(ge=1)], ...] = ()
    max_queue_delay_microseconds: Count = 0
    preserve_ordering: bool = False
    default_queue_policy: QueuePolicy | None = None


class Resource(_Part):
    """Something of which an instance takes ``count`` while it runs; ``global`` is shared by all devices."""

    name: str
    global_: bool = Field(default=False, alias="global")
    count: Count


class RateLimiter(_Part):
    """In effect only under ``tritonserver --rate-limit=execution_count``."""

    resources: tuple[Resource, ...] = ()
    priority: Count = 0


class InstanceGroup(_Part):
    """Copies of the model: ``count`` on the CPU, or on each of ``gpus`` (all of them if none is named)."""

    count: int = Field(ge=1)
    kind: Literal["KIND_CPU", "KIND_GPU"]
    gpus: tuple[Count, ...] = ()
    rate_limiter: RateLimiter | None = None


class WarmupInput(_Part):
    """One input of a warm-up request: zeros (empty strings), or a file of the model's folder ``warmup``."""

    data_type: DataType
    dims: tuple[int, ...]
    zero_data: bool | None = None
    input_data_file: str | None = None


class ModelWarmup(_Part):
    """A request that Triton sends to a model before it is ready."""

    name: str
    batch_size: int = Field(ge=1)
    inputs: dict[str, WarmupInput]


class Parameter(_Part):
    """The value of one of the model's own parameters."""

    string_value: str


class Accelerator(_Part):
    """An execution accelerator of ONNX Runtime, such as ``tensorrt``."""

    name: str
    parameters: dict[str, str] = {}


class ExecutionAccelerators(_Part):
    """Which accelerators a backend may use."""

    gpu_execution_accelerator: tuple[Accelerator, ...] = ()
    cpu_execution_accelerator: tuple[Accelerator, ...] = ()


class Optimization(_Part):
    """How a backend runs the model."""

    execution_accelerators: ExecutionAccelerators | None = None


class ResponseCache(_Part):
    """Whether equal requests get the answer of the first."""

    enable: bool


class TransactionPolicy(_Part):
    """Whether a request may have any number of responses."""

    decoupled: bool


class ModelConfig(_Part):
    """``config.pbtxt``: what Triton has to know of a model."""

    name: str
    platform: str = ""
    backend: str = ""
    version_policy: VersionPolicy | None = None
    max_batch_size: Count
    input: tuple[Input, ...]
    output: tuple[Output, ...]
    optimization: Optimization | None = None
    dynamic_batching: DynamicBatching | None = None
    instance_group: tuple[InstanceGroup, ...] = ()
    default_model_filename: str = ""
    parameters: dict[str, Parameter] = {}
    model_warmup: tuple[ModelWarmup, ...] = ()
    model_transaction_policy: TransactionPolicy | None = None
    response_cache: ResponseCache | None = None

    def to_text(self) -> str:
        """``config.pbtxt``, with a final newline."""
        return write(self.message())
