"""Optimum's export of a pipeline, one component at a time, each in its own precision.

``onnx_export_from_model`` takes one precision for the whole pipeline and keeps every component in memory to the end;
here each is exported by Optimum's own ``export``, checked, and let go.
"""

from __future__ import annotations

import errno
import gc
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from excise.errors import ArtefactError, ExciseError, MissingExtra, UsageError
from excise.export.denoisers import Denoiser, encode
from excise.export.layout import MODEL, gather
from excise.export.options import ExportOptions, StaticShapes
from excise.export.pipeline import first_line
from excise.export.quiet import quiet

_OF_THE_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS)
_BESIDE = ("scheduler", "feature_extractor", "tokenizer", "tokenizer_2", "tokenizer_3")


@dataclass(frozen=True)
class Sizes:
    """Fixed shapes of every component.

    Attributes:
        batch: Rows of each.
        image: Height and width, in pixels.
        latents: Height and width.
        tokens: Of each text encoder by its name, and of the denoiser's text as "denoiser".
    """

    batch: int
    image: tuple[int, int]
    latents: tuple[int, int]
    tokens: dict[str, int]


def fixed_sizes(pipe: Any, family: Denoiser, static: StaticShapes) -> Sizes:
    """What ``static`` is for each component; the configurations that name a size are set to it.

    Raises:
        UsageError: The family can't make images of that size.
    """
    step = pipe.vae_scale_factor * family.patch
    for name, side in (("height", static.height), ("width", static.width)):
        if side % step:
            raise UsageError(f"static.{name} {side}: {family.title} makes images of multiples of {step}")
    height, width = static.height // pipe.vae_scale_factor, static.width // pipe.vae_scale_factor
    tokens = {"denoiser": encode(pipe, family, [""])["encoder_hidden_states"].shape[1]}
    for name in ("text_encoder", "text_encoder_2", "text_encoder_3"):
        if getattr(pipe, name, None) is not None:
            tokenizer = getattr(pipe, name.replace("text_encoder", "tokenizer"))
            tokens[name] = family.lengths.get(name) or tokenizer.model_max_length
    denoiser = getattr(pipe, family.component)
    if "sample_size" in denoiser.config:
        denoiser.register_to_config(sample_size=(height, width))
    pipe.vae.register_to_config(sample_size=(static.height, static.width))
    return Sizes(static.batch, (static.height, static.width), (height, width), tokens)


def export_components(
    pipe: Any,
    folder: Path,
    options: ExportOptions,
    say: Callable[[str], None],
    sizes: Sizes | None = None,
    *,
    scattered: str | None = None,
) -> None:
    """Write the pipeline's ONNX models and configurations to ``folder``; nothing else reaches the terminal.

    The pipeline is spent: its components are cast to ``options``' precision and let go once they are exported.

    Args:
        pipe: A loaded pipeline of a family that can be exported, in float32.
        folder: An empty folder.
        options: Precisions and operator set.
        say: Told each component, and Optimum's doubts.
        sizes: Fixed shapes; None for dynamic ones.
        scattered: The component whose external data is left as PyTorch wrote it, a file a tensor, for ``separate``.

    Raises:
        ArtefactError: Optimum failed; the message is the cause's first line.
        MissingExtra: It isn't installed.
    """
    try:
        with quiet():
            from optimum.exporters.onnx import export  # noqa: F401 (it fills the registry that _prepare asks)
    except ImportError as error:
        raise MissingExtra("optimum-onnx", "export") from error
    try:
        with quiet():
            models = _prepare(pipe, folder, options)
        for name in list(models):
            say(f"exporting {name} to ONNX")
            with quiet():
                doubts = list(
                    _export_one(name, *models.pop(name), folder / name, options, sizes, together=name != scattered)
                )
                _let_go(pipe, name)
            for doubt in doubts:
                say(f"{name}: {doubt}")
    except (ExciseError, MemoryError):
        raise
    except Exception as error:
        cause = _innermost(error)
        if isinstance(cause, OSError) and cause.errno in _OF_THE_DISK:
            raise cause from error
        raise ArtefactError(f"the export to ONNX failed: {first_line(cause)}") from error


def _prepare(pipe: Any, folder: Path, options: ExportOptions) -> dict[str, tuple[Any, Any]]:
    """Cast the components, write the pipeline's configuration, and pair every model with Optimum's description."""
    from optimum.exporters.utils import get_diffusion_models_for_export

    if getattr(pipe, "safety_checker", None) is not None:
        pipe.register_modules(safety_checker=None)
        pipe.register_to_config(requires_safety_checker=False)
    for name, module in pipe.components.items():
        if (options.vae_dtype if name == "vae" else options.dtype) == "fp16" and hasattr(module, "named_modules"):
            to_half(module)
    models: dict[str, tuple[Any, Any]] = get_diffusion_models_for_export(
        pipe, int_dtype="int64", float_dtype=options.dtype, exporter="onnx"
    )
    for name, (model, description) in models.items():
        if name.startswith("vae_"):
            description.float_dtype = options.vae_dtype
        save = getattr(model, "save_config", None) or model.config.save_pretrained
        save(folder / name)
    for name in _BESIDE:
        if getattr(pipe, name, None) is not None:
            getattr(pipe, name).save_pretrained(folder / name)
    pipe.save_config(folder)
    return models


def to_half(module: Any) -> None:
    """Round a torch model's parameters and buffers to float16, in place, each once.

    What its library keeps in float32 stays so: T5's ``wo``, whose products overflow in float16.
    """
    import torch

    kept = set(getattr(module, "_keep_in_fp32_modules", None) or ())
    with torch.no_grad():
        for path, part in module.named_modules():
            if kept.intersection(path.split(".")):
                continue
            for tensor in [*part.parameters(recurse=False), *part.buffers(recurse=False)]:
                if tensor.dtype == torch.float32:
                    tensor.data = tensor.data.half()
    if hasattr(module.config, "dtype"):
        module.config.dtype = torch.float16


def _export_one(
    name: str,
    model: Any,
    description: Any,
    folder: Path,
    options: ExportOptions,
    sizes: Sizes | None,
    *,
    together: bool,
) -> Iterator[str]:
    """Export one model and compare it with torch on Optimum's dummy inputs; yields what Optimum doubts."""
    from optimum.exporters.error_utils import AtolError, OutputMatchError
    from optimum.exporters.onnx import export, validate_model_outputs

    shapes = _shapes(name, sizes) if sizes is not None else {}
    path = folder / MODEL
    precision = description.float_dtype
    with _tensors_as_written():
        _, outputs = export(
            model,
            description,
            path,
            opset=options.opset,
            input_shapes=shapes,
            dtype=precision,
            no_dynamic_axes=sizes is not None,
        )
    if path.is_file() and together:
        gather(path)
    if not path.is_file():
        raise ArtefactError(f"the export to ONNX failed: Optimum wrote no {name}/{MODEL}")
    # In float16 torch and ONNX Runtime's CPU provider, which computes in float32, differ by rounding: only shapes and
    # NaN are compared.
    tolerance = math.inf if precision == "fp16" else None
    try:
        validate_model_outputs(
            description, model, path, outputs, atol=tolerance, input_shapes=shapes, use_subprocess=False
        )
    except (AtolError, OutputMatchError) as error:
        yield " ".join(str(error).split())


@contextmanager
def _tensors_as_written() -> Iterator[None]:
    """Let Optimum leave a model of over 2 GB as PyTorch wrote it, with a file a tensor.

    It would load the whole model and save it again; ``gather`` copies tensor by tensor.
    """
    from optimum.exporters.onnx import convert

    asked = convert.check_model_uses_external_data
    convert.check_model_uses_external_data = lambda model: False
    try:
        yield
    finally:
        convert.check_model_uses_external_data = asked


def _shapes(name: str, sizes: Sizes) -> dict[str, int]:
    """Optimum's names for the fixed shapes of one component."""
    height, width = sizes.image if name == "vae_encoder" else sizes.latents
    tokens = sizes.tokens.get(name, sizes.tokens["denoiser"])
    return {"batch_size": sizes.batch, "sequence_length": tokens, "height": height, "width": width}


def _let_go(pipe: Any, name: str) -> None:
    """Free a component that is exported; the VAE's two halves are copies, so it isn't needed either."""
    part = "vae" if name.startswith("vae_") else name
    setattr(pipe, part, None)
    gc.collect()


def _innermost(error: BaseException) -> BaseException:
    """What went wrong in the first place: Optimum wraps it."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error
