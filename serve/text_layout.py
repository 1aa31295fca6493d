"""Which text encoders an exported pipeline has, one (Stable Diffusion 1 and 2) or two (XL), by its folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from excise.errors import ArtefactError, ModelError
from excise.serve.json_object import read_json_object
from excise.serve.onnx_component import read_config
from excise.serve.tokenizer import PromptTokenizer


@dataclass(frozen=True)
class TextLayout:
    """Of one folder.

    Attributes:
        encoders: names of the text encoders' folders, in the order in which their hidden states are joined.
        zeros_for_empty_negative: whether an empty negative prompt is zeros instead of its text's hidden states.
    """

    encoders: tuple[str, ...]
    zeros_for_empty_negative: bool = False

    @property
    def components(self) -> tuple[str, ...]:
        """Names of everything that makes an image."""
        return (*self.encoders, "unet", "vae_decoder")

    @property
    def tokenizers(self) -> tuple[str, ...]:
        """Names of the tokenizers' folders, one for each text encoder."""
        return tuple(name.replace("text_encoder", "tokenizer") for name in self.encoders)


def read_text_layout(folder: Path) -> TextLayout:
    """The layout by ``model_index.json``, or without that by the folders alone. Nothing else is looked for here.

    SDXL is what says so, or has a ``text_encoder_2``. Its ``force_zeros_for_empty_prompt`` is true where it isn't
    named, as in diffusers.

    Raises:
        ArtefactError: ``model_index.json`` can't be read.
        ModelError: it is SDXL's refiner, or has a transformer in place of a UNet.
    """
    file = folder / "model_index.json"
    index = read_json_object(file, remedy=": export the model again") if file.is_file() else {}
    if index.get("requires_aesthetics_score"):
        raise ModelError(f"{folder} is SDXL's refiner, which starts from another model's latents: name the base model")
    if (folder / "transformer").is_dir() and not (folder / "unet").is_dir():
        raise ModelError(
            f"{folder} has a transformer and no unet: Stable Diffusion 1, 2 and XL are run here; excise verify "
            "--components compares every family that excise exports"
        )
    if (folder / "text_encoder_2").is_dir() or "StableDiffusionXL" in str(index.get("_class_name")):
        zeros = bool(index.get("force_zeros_for_empty_prompt", True))
        return TextLayout(("text_encoder", "text_encoder_2"), zeros_for_empty_negative=zeros)
    return TextLayout(("text_encoder",))


def check_files(folder: Path, layout: TextLayout) -> None:
    """Look for every file that a runtime needs.

    Raises:
        ArtefactError: one is missing, or a component's ``config.json`` can't be read.
    """
    for component in layout.components:
        read_config(folder, component)
    for file in (*(f"{name}/tokenizer_config.json" for name in layout.tokenizers), "scheduler/scheduler_config.json"):
        if not (folder / file).is_file():
            raise ArtefactError(f"{folder} has no {file}: export the model to ONNX again")


def open_tokenizers(folder: Path, layout: TextLayout, lengths: list[int | None]) -> list[PromptTokenizer]:
    """The tokenizers, which read at most what their text encoders do, ``lengths``.

    Raises:
        ModelError: one can't be used, or two pad prompts to different lengths.
    """
    found = [
        PromptTokenizer(folder / name, max_length=length)
        for name, length in zip(layout.tokenizers, lengths, strict=True)
    ]
    if len({one.max_length for one in found}) > 1:
        shown = " and ".join(f"{name} {one.max_length}" for name, one in zip(layout.tokenizers, found, strict=True))
        raise ModelError(f"{folder} reads prompts of different lengths, {shown} tokens: export the model again")
    return found
