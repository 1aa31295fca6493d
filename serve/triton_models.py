"""The configurations of the models in a repository: the pipeline's, and those of the networks that it may call.

The pipeline's inputs have one value a request, and everything but the prompt may be left out:

    PROMPT               BYTES  [n, 1]
    NEGATIVE_PROMPT      BYTES  [n, 1]     empty
    SEED                 INT64  [n, 1]
    NUM_INFERENCE_STEPS  INT32  [n, 1]
    GUIDANCE_SCALE       FP32   [n, 1]
    EDIT                 BYTES  [n, 1]     an edit's name
    → IMAGES             UINT8  [n, height, width, 3]
    → STEP               INT32  [n, 1]     only where previews are streamed
"""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

import numpy as np

from excise.enginefile import TensorEntry
from excise.errors import ArtefactError
from excise.serve.latent_shape import halvings, latent_shape
from excise.serve.onnx_component import read_config
from excise.serve.onnx_signature import Signature
from excise.serve.triton_config import (
    DATA_TYPES,
    DynamicBatching,
    Input,
    InstanceGroup,
    ModelConfig,
    ModelWarmup,
    Output,
    Parameter,
    QueuePolicy,
    RateLimiter,
    Resource,
    ResponseCache,
    Specific,
    TransactionPolicy,
    VersionPolicy,
    WarmupInput,
)
from excise.serve.triton_options import TritonOptions

Tensor = TypeVar("Tensor", Input, Output)

#: Parameters of the pipeline's configuration, beside those of the edit in ``repository_record``.
BACKEND, THREADS, PROVIDER = "excise.backend", "excise.threads", "excise.provider"
MAX_STEPS, STREAM_EVERY = "excise.max_steps", "excise.stream_every"

#: Triton's platforms of the networks, and the file of each.
PLATFORMS = {"onnxruntime": ("onnxruntime_onnx", "model.onnx"), "tensorrt": ("tensorrt_plan", "model.plan")}

#: Steps of the warm-up's image, and of the one that a promotion asks for.
FEW_STEPS = 2


def warmup_files(options: TritonOptions) -> dict[str, bytes]:
    """Name and content of the files of the folder ``warmup``."""
    steps = min(FEW_STEPS, options.max_steps)
    return {"steps": np.array([steps], "<i4").tobytes(), "guidance": np.array([7.5], "<f4").tobytes()}


def pipeline_config(options: TritonOptions, image_shape: tuple[int, int, int], *, warmup: bool) -> ModelConfig:
    """The pipeline's model, of images with shape (height, width, 3); its edit and version are added by the record."""
    parameters = {
        BACKEND: "python" if options.backend == "python" else "bls",
        PROVIDER: options.provider,
        MAX_STEPS: str(options.max_steps),
        STREAM_EVERY: str(options.stream_every),
    }
    if options.threads is not None:
        parameters[THREADS] = str(options.threads)
    images = [Output(name="IMAGES", data_type="TYPE_UINT8", dims=image_shape)]
    if options.stream_every:
        images.append(Output(name="STEP", data_type="TYPE_INT32", dims=(1,)))
    preferred = options.preferred_batch_sizes or ((options.max_batch_size,) if options.max_batch_size > 1 else ())
    return ModelConfig(
        name=options.name,
        backend="python",
        max_batch_size=options.max_batch_size,
        input=(
            Input(name="PROMPT", data_type="TYPE_STRING", dims=(1,)),
            Input(name="NEGATIVE_PROMPT", data_type="TYPE_STRING", dims=(1,), optional=True),
            Input(name="SEED", data_type="TYPE_INT64", dims=(1,), optional=True),
            Input(name="NUM_INFERENCE_STEPS", data_type="TYPE_INT32", dims=(1,), optional=True),
            Input(name="GUIDANCE_SCALE", data_type="TYPE_FP32", dims=(1,), optional=True),
            Input(name="EDIT", data_type="TYPE_STRING", dims=(1,), optional=True),
        ),
        output=tuple(images),
        dynamic_batching=DynamicBatching(
            preferred_batch_size=preferred,
            max_queue_delay_microseconds=options.max_queue_delay_microseconds,
            default_queue_policy=QueuePolicy(
                default_timeout_microseconds=round(options.queue_timeout_seconds * 1e6),
                allow_timeout_override=True,
                max_queue_size=options.max_queue_size,
            ),
        ),
        instance_group=(_instances(options, options.instances),),
        parameters={name: Parameter(string_value=value) for name, value in parameters.items()},
        # Streaming needs other warm-up requests, and the canary has run every network by then anyway.
        model_warmup=(_warmup(),) if warmup and not options.stream_every else (),
        model_transaction_policy=TransactionPolicy(decoupled=options.stream_every > 0),
        # Two requests for one seed must both run: what the canary vouches for is what is served.
        response_cache=ResponseCache(enable=False),
    )


def network_config(name: str, options: TritonOptions, signature: Signature) -> ModelConfig:
    """The model of one network. Its inputs' first dimensions aren't always a batch, so Triton is told of none.

    Raises ``ArtefactError`` for a tensor that Triton hasn't.
    """
    platform, file = PLATFORMS[options.backend]
    inputs, outputs = tensors(signature)
    return ModelConfig(
        name=name,
        platform=platform,
        max_batch_size=0,
        input=inputs,
        output=outputs,
        default_model_filename=file,
        version_policy=VersionPolicy(specific=Specific(versions=(1,))),
        instance_group=(_instances(options, options.network_instances),),
        response_cache=ResponseCache(enable=False),
    )


def tensors(signature: Signature) -> tuple[tuple[Input, ...], tuple[Output, ...]]:
    """A network's inputs and outputs in Triton's words, with every dimension.

    Raises ``ArtefactError`` for a tensor that Triton hasn't: one of a strange type, or without dimensions.
    """
    inputs = tuple(_tensor(Input, name, tensor) for name, tensor in sorted(signature.inputs.items()))
    outputs = tuple(_tensor(Output, name, tensor) for name, tensor in sorted(signature.outputs.items()))
    return inputs, outputs


def _tensor(kind: type[Tensor], name: str, tensor: TensorEntry) -> Tensor:
    if tensor.dtype not in DATA_TYPES:
        raise ArtefactError(f"{name} is a {tensor.dtype}, which Triton hasn't: export the model again")
    # Triton has no empty dims, and refuses a reshape to none where the first dimension isn't a batch.
    if not tensor.shape:
        raise ArtefactError(
            f"{name} is a scalar, and Triton takes none: excise serve build --backend onnxruntime gives it shape (1); "
            "for tensorrt, build the engines by excise engines ONNX_DIR --for-triton --out ENGINES"
        )
    return kind(name=name, data_type=DATA_TYPES[tensor.dtype], dims=tensor.shape)


def image_shape(folder: Path) -> tuple[int, int, int]:
    """(height, width, 3) of the images of an exported pipeline.

    Raises:
        ArtefactError, ModelError: It isn't whole, or isn't a Stable Diffusion 1 or 2.
    """
    vae = read_config(folder, "vae_decoder")
    _, height, width = latent_shape(read_config(folder, "unet"), vae)
    upscaling = halvings(vae)
    return height * upscaling, width * upscaling, 3


def _instances(options: TritonOptions, count: int) -> InstanceGroup:
    resources = tuple(Resource(name=name, count=number) for name, number in options.resources.items())
    return InstanceGroup(
        count=count,
        kind="KIND_GPU" if options.gpus else "KIND_CPU",
        gpus=options.gpus,
        rate_limiter=RateLimiter(resources=resources) if resources else None,
    )


def _warmup() -> ModelWarmup:
    """One image of the empty prompt in a few steps."""
    return ModelWarmup(
        name="one image",
        batch_size=1,
        inputs={
            "PROMPT": WarmupInput(data_type="TYPE_STRING", dims=(1,), zero_data=True),
            "NUM_INFERENCE_STEPS": WarmupInput(data_type="TYPE_INT32", dims=(1,), input_data_file="steps"),
            "GUIDANCE_SCALE": WarmupInput(data_type="TYPE_FP32", dims=(1,), input_data_file="guidance"),
        },
    )
