"""The models in folders that are compared and evaluated: how they are named, opened and described."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol, get_args
from urllib.parse import parse_qsl

import numpy.typing as npt
from pydantic import BaseModel, ConfigDict
from safetensors import safe_open

from excise.demo import MODEL
from excise.editfile import Edit, load_edit
from excise.errors import ModelError, UsageError
from excise.eval.onnx_precision import read_formats
from excise.serve.denoising import OnStep
from excise.serve.guidance import CLASSIFIER_FREE, Guidance
from excise.serve.noise_schedule import Array
from excise.serve.onnx_component import PROVIDERS, providers, read_config
from excise.serve.onnx_runtime import OnnxRuntime
from excise.serve.runtime import Progress, Request, Runtime
from excise.serve.safe_latent_diffusion import UNSAFE_CONCEPT, SafeLatentDiffusion
from excise.serve.schedulers import read_scheduler_config
from excise.serve.text_conditioning import TextConditioning
from excise.serve.text_layout import read_text_layout

#: How coarsely a side computes: ``half`` is 11 significant bits (float16, and TF32 on a GPU), ``bfloat16`` has 8.
Rounding = Literal["float32", "half", "bfloat16"]

#: The scheduler's configuration in a pipeline's folder, torch or ONNX.
SCHEDULER = "scheduler/scheduler_config.json"

#: Loads a diffusers folder as a pipeline in float32 on the CPU, with an edit or None applied to it.
LoadPipeline = Callable[[Path, Edit | None], Any]

#: What can follow the ``?``, by kind, with its default.
_BOTH = {"edit": "", "sld": "", "sld_concept": ""}
SIDE_OPTIONS = {"torch": {"device": "cpu", "dtype": "float32", **_BOTH}, "onnx": {"provider": "cpu", **_BOTH}}
_DTYPES: dict[str, Rounding] = {"float32": "float32", "float16": "half", "bfloat16": "bfloat16"}
_TORCH_COMPONENTS = ("text_encoder", "unet", "vae")
_ON_GPU = "on a GPU, where TF32 may be used"


class Comparable(Runtime, Protocol):
    """What is compared: ``OnnxRuntime`` and ``TorchRuntime`` are two."""

    latent_shape: tuple[int, int, int]
    batch_size: int

    def condition(self, prompts: Sequence[str]) -> TextConditioning:
        """What prompts become."""

    def predict(
        self, sample: Array, timestep: float, encoder_hidden_states: Array, *, text_embeds: Array | None = None
    ) -> Array:
        """The denoiser's output (b, c, h, w)."""

    def decode_samples(self, latents: Array) -> Array:
        """Images (n, 3, height, width), about −1 to 1."""

    def denoise(
        self,
        requests: Sequence[Request],
        *,
        num_inference_steps: int,
        guidance_scale: float,
        progress: Progress | None = None,
        on_step: OnStep | None = None,
    ) -> Array:
        """Final latents (n, c, h, w)."""


@dataclass(frozen=True)
class SideSpec:
    """``torch:DIR?device=cpu&dtype=float32`` or ``onnx:DIR?provider=cpu``, parsed.

    Either takes ``edit=FILE`` too: an edit that is applied in memory, to an unedited folder of torch or in place of the
    edit of an ONNX folder. ``sld=medium`` guides by Safe Latent Diffusion at that strength, away from ``sld_concept``
    or what was published as unsafe.
    """

    kind: Literal["torch", "onnx"]
    folder: Path
    options: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        given = "&".join(f"{name}={value}" for name, value in self.options.items())
        return f"{self.kind}:{self.folder}" + (f"?{given}" if given else "")

    @property
    def guidance(self) -> Guidance:
        """Safe Latent Diffusion where it is asked for, else classifier-free guidance.

        Raises:
            UsageError: a strength that SLD hasn't, or a concept without a strength.
        """
        strength, concept = self.options.get("sld"), self.options.get("sld_concept")
        if strength is None:
            if concept is not None:
                raise UsageError(f"{self}: sld_concept={concept!r} needs sld=weak, medium, strong or max")
            return CLASSIFIER_FREE
        return SafeLatentDiffusion(strength, UNSAFE_CONCEPT if concept is None else concept)


class Description(BaseModel):
    """What a side is: its name, the edit that it says it carries, and the precision that each component computes in."""

    model_config = ConfigDict(frozen=True)

    side: str
    edit: str | None
    precision: dict[str, str]
    rounding: Rounding


@dataclass(frozen=True)
class Side:
    """An opened side."""

    spec: SideSpec
    runtime: Comparable
    description: Description
    scheduler: dict[str, Any]  #: the parsed ``scheduler_config.json``

    def weights(self, names: Sequence[str]) -> dict[str, npt.NDArray[Any]] | None:
        """The UNet's weights of these torch names, those there are; None for an ONNX side, which has other names."""
        if isinstance(self.runtime, OnnxRuntime):
            return None
        parameters = dict(self.runtime.pipeline.unet.named_parameters())  # type: ignore[attr-defined]
        return {name: parameters[name].detach().float().cpu().numpy() for name in names if name in parameters}


def parse_side(text: str) -> SideSpec:
    """``torch:DIR`` or ``onnx:DIR`` with options after ``?``; a bare folder is recognised by what it holds.

    ``demo:model`` is the bundled model's folder.

    Raises:
        UsageError: An unknown option or value, or a bare folder that isn't one pipeline.
    """
    place, _, query = text.partition("?")
    kind, colon, rest = place.partition(":")
    if not colon or kind not in SIDE_OPTIONS:
        kind, rest = "", place
    folder = MODEL if rest == "demo:model" else Path(rest)
    kind = kind or _recognised(folder)
    options = dict(parse_qsl(query, keep_blank_values=True))
    for name, value in options.items():
        if name not in SIDE_OPTIONS[kind]:
            raise UsageError(f"{text}: {kind} has no option {name!r}, only {', '.join(SIDE_OPTIONS[kind])}")
        choices = {"provider": tuple(PROVIDERS), "dtype": tuple(_DTYPES)}.get(name)
        if choices and value not in choices:
            raise UsageError(f"{text}: {name}={value!r} isn't one of {', '.join(choices)}")
    spec = SideSpec("onnx" if kind == "onnx" else "torch", folder, options)
    _ = spec.guidance
    return spec


def _recognised(folder: Path) -> str:
    if not folder.is_dir():
        raise UsageError(f"{folder} isn't a folder: name torch:DIR (a diffusers pipeline) or onnx:DIR (an export)")
    onnx = (folder / "unet" / "model.onnx").is_file()
    torch = any((folder / "unet").glob("diffusion_pytorch_model*.safetensors"))
    if onnx == torch:
        what = "both a diffusers and an ONNX pipeline: say torch:DIR or onnx:DIR" if onnx else "no pipeline with a UNet"
        raise UsageError(f"{folder} holds {what}")
    return "onnx" if onnx else "torch"


def check_side(spec: SideSpec) -> None:
    """Look for what can be missing before any long work: the folder's files, and the provider.

    Raises:
        ArtefactError, ModelError: The folder isn't a pipeline.
        UsageError: This machine hasn't the provider.
    """
    if spec.kind == "onnx":
        providers(spec.options.get("provider", "cpu"))
        for component in read_text_layout(spec.folder).components:
            read_config(spec.folder, component)
    elif not (spec.folder / "model_index.json").is_file():
        raise ModelError(f"{spec.folder} is not a diffusers folder: it has no model_index.json")
    read_scheduler_config(spec.folder / SCHEDULER)


def open_side(
    spec: SideSpec,
    load_pipeline: LoadPipeline,
    *,
    name: str | None = None,
    batch_size: int = 4,
    threads: int | None = None,
) -> Side:
    """Load a side.

    Args:
        load_pipeline: for a folder of torch; an ONNX one never calls it.
        name: what reports call it, instead of ``spec``.
        batch_size: images that are denoised together.
        threads: of ONNX Runtime's CPU provider; None leaves them to it. PyTorch's are the process's, not a side's.

    Raises:
        ArtefactError, ModelError: The folder isn't a pipeline, is incomplete, or isn't Stable Diffusion 1, 2 or XL.
        UsageError: A provider or device that this machine hasn't, or a bank of edits.
        EditError: ``edit=FILE`` can't be read, or is another model's.
    """
    options = {**SIDE_OPTIONS[spec.kind], **spec.options}
    edit = load_edit(Path(options["edit"])) if options["edit"] else None
    runtime: Comparable
    if spec.kind == "onnx":
        provider: Any = options["provider"]
        runtime = OnnxRuntime(
            spec.folder,
            name=name or str(spec),
            provider=provider,
            batch_size=batch_size,
            threads=threads,
            edit=edit,
            guidance=spec.guidance,
        )
        if runtime.bank is not None:
            raise UsageError(f"{spec.folder} holds a bank of edits: name a folder that carries one edit")
        carried = runtime.edit_id
    else:
        from excise.eval.torch_runtime import TorchRuntime

        pipeline = load_pipeline(spec.folder, edit)
        _move(pipeline, spec, options["device"], options["dtype"])
        runtime = TorchRuntime(pipeline, name=name or str(spec), batch_size=batch_size, guidance=spec.guidance)
        carried = edit.id if edit else None
    described, rounding = precision(spec)
    description = Description(side=str(spec), edit=carried, precision=described, rounding=rounding)
    return Side(spec, runtime, description, read_scheduler_config(spec.folder / SCHEDULER))


def precision(spec: SideSpec) -> tuple[dict[str, str], Rounding]:
    """What each component computes in, in words, and the coarsest of it; by the folder's files, without loading them.

    Raises:
        ArtefactError: an ONNX file can't be read.
    """
    options = {**SIDE_OPTIONS[spec.kind], **spec.options}
    if spec.kind == "onnx":
        return _onnx_precision(spec.folder, options["provider"])
    return _torch_precision(spec.folder, options["device"], options["dtype"], edited=bool(options["edit"]))


def _onnx_precision(folder: Path, provider: str) -> tuple[dict[str, str], Rounding]:
    described, coarse = {}, provider != "cpu"
    for component in read_text_layout(folder).components:
        formats = read_formats(folder / component / "model.onnx")
        named = {*formats.initializers, *formats.inputs_outputs}
        half = any("float" in name and name not in ("float32", "float64") for name in named)
        coarse |= half
        text = f"initialisers {', '.join(formats.initializers)}; inputs and outputs {', '.join(formats.inputs_outputs)}"
        if provider != "cpu":
            text += f"; {_ON_GPU}"
        elif half:
            text += "; ONNX Runtime's CPU provider computes float16 in float32"
        described[component] = text
    return described, "half" if coarse else "float32"


def _torch_precision(folder: Path, device: str, dtype: str, *, edited: bool) -> tuple[dict[str, str], Rounding]:
    place = "" if device == "cpu" else f", {_ON_GPU}"
    xl = (folder / "text_encoder_2").is_dir()
    components = ("text_encoder", "text_encoder_2", "unet", "vae") if xl else _TORCH_COMPONENTS
    described = dict.fromkeys(components, f"{dtype}{place}")
    if xl and dtype == "float16":
        described["vae"] = f"float32{place}"
    rounding = coarsest(_DTYPES[dtype], "half" if place else "float32")
    if not edited and (stored := stored_format(folder / "unet")) != "float32":
        # the edited weights were rounded to it: an export of the edit was not
        described["unet"] += f", weights stored in {stored}"
        rounding = coarsest(rounding, _DTYPES[stored])
    return described, rounding


def _move(pipeline: Any, spec: SideSpec, device: str, dtype: str) -> None:
    """A pipeline's modules to a device, in a number format."""
    unknown = [name for name in ("transformer", "text_encoder_3") if getattr(pipeline, name, None) is not None]
    xl = getattr(pipeline, "text_encoder_2", None) is not None
    wanted = (*_TORCH_COMPONENTS, "tokenizer", *(("tokenizer_2",) if xl else ()))
    missing = [name for name in wanted if getattr(pipeline, name, None) is None]
    if unknown or missing:
        what = f"has {unknown[0]}" if unknown else f"has no {missing[0]}"
        raise ModelError(
            f"{spec.folder} is a {type(pipeline).__name__}, which {what}: verify compares Stable Diffusion 1, 2 and "
            "XL, and eval runs no others; excise verify --components compares every family that excise exports"
        )
    import torch

    modules = [part for part in pipeline.components.values() if isinstance(part, torch.nn.Module)]
    try:
        for module in modules:
            # SDXL's VAE overflows in float16: its pipeline computes it in float32, too
            kept = xl and dtype == "float16" and module is pipeline.vae
            # diffusers' own warns of every cast
            torch.nn.Module.to(module, device, torch.float32 if kept else getattr(torch, dtype))
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition("\n")[0]
        raise UsageError(f"{spec}: device {device!r} can't be used: {reason}") from error


def stored_format(folder: Path) -> str:
    """The coarsest floating-point format of a component's safetensors weights; ``float32`` where there are none."""
    found: Rounding = "float32"
    names: dict[Rounding, str] = {"float32": "float32", "half": "float16", "bfloat16": "bfloat16"}
    for path in folder.glob("diffusion_pytorch_model*.safetensors"):
        with safe_open(path, framework="np") as opened:
            for name in opened.keys():  # noqa: SIM118 (not a mapping)
                stored = {"F16": "half", "BF16": "bfloat16"}.get(opened.get_slice(name).get_dtype(), "float32")
                found = coarsest(found, stored)  # type: ignore[arg-type]
    return names[found]


def coarsest(*roundings: Rounding) -> Rounding:
    """The one with the fewest significant bits."""
    order: tuple[Rounding, ...] = get_args(Rounding)
    return max(roundings, key=order.index)
