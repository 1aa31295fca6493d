"""How a Triton model repository is to run: batching, queue, instances, limits."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Backend = Literal["python", "onnxruntime", "tensorrt"]
Positive = Annotated[int, Field(ge=1)]
Count = Annotated[int, Field(ge=0)]

#: The models that the backends other than ``python`` run, each an ONNX file or an engine.
NETWORKS = ("text_encoder", "unet", "vae_decoder")


class TritonOptions(BaseModel):
    """What ``config.pbtxt`` is made of beside the model's own inputs and outputs.

    Attributes:
        name: Of the pipeline's model.
        backend: ``python`` runs everything in ONNX Runtime inside Triton's Python backend; with ``onnxruntime`` and
            ``tensorrt`` the networks are models of their own on that backend, which the pipeline calls.
        max_batch_size: Images of one batch.
        preferred_batch_sizes: Which batches the queue waits for; by default the largest.
        max_queue_delay_microseconds: How long it waits for them; by default not at all.
        max_queue_size: Requests that may wait, 0 for any number; beyond it they are refused.
        queue_timeout_seconds: How long a request may wait, 0 for any time; it may ask for less.
        instances: Copies of the pipeline, on each GPU if there are any.
        gpus: Numbers of the GPUs; none is the CPU.
        network_instances: Copies of each network.
        provider: Where ONNX Runtime runs the networks, for ``python``.
        threads: CPU threads of an operator; all of them by default.
        max_steps: More denoising steps than that are refused.
        stream_every: A preview after every so many steps, as responses of their own; 0 for none.
        warmup: Whether Triton sends a request of two steps before the model is ready.
        resources: Of Triton's rate limiter: what one instance takes while it runs, by name.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")] = "excise"
    backend: Backend = "python"
    max_batch_size: Positive = 8
    preferred_batch_sizes: tuple[Positive, ...] = ()
    max_queue_delay_microseconds: Count = 0
    max_queue_size: Count = 64
    queue_timeout_seconds: Annotated[float, Field(ge=0, le=86400, allow_inf_nan=False)] = 60.0
    instances: Positive = 1
    gpus: tuple[Count, ...] = ()
    network_instances: Positive = 1
    provider: Literal["cpu", "cuda", "tensorrt"] = "cpu"
    threads: Positive | None = None
    max_steps: Positive = 100
    stream_every: Count = 0
    warmup: bool = True
    resources: dict[Annotated[str, Field(min_length=1)], Positive] = {}

    @model_validator(mode="after")
    def _together(self) -> TritonOptions:
        if self.name in NETWORKS:
            raise ValueError(f"name={self.name!r} is a network's: choose another")
        if too_large := [size for size in self.preferred_batch_sizes if size > self.max_batch_size]:
            raise ValueError(f"preferred batch size {too_large[0]} is beyond max_batch_size={self.max_batch_size}")
        if self.backend != "python" and self.provider != "cpu":
            raise ValueError(f"provider={self.provider} is for backend python: {self.backend} runs the networks itself")
        if self.backend == "tensorrt" and not self.gpus:
            raise ValueError("backend tensorrt needs a GPU: give gpus")
        if self.backend == "python" and (self.provider == "cpu") != (not self.gpus):
            raise ValueError(
                f"provider={self.provider} and gpus={list(self.gpus)}: give GPUs for cuda and tensorrt, none for cpu"
            )
        return self

    @property
    def networks(self) -> tuple[str, ...]:
        """The models beside the pipeline's."""
        return () if self.backend == "python" else NETWORKS
