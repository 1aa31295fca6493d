"""Prompts through the text encoders of an exported pipeline.

Stable Diffusion 1 and 2 read the last hidden states of one encoder. SDXL reads the last but one of two encoders, joined
on the last axis, and the second encoder's projected vector of the whole prompt (Podell et al. 2023, §2.1). Optimum
gives an encoder's hidden states as outputs ``hidden_states.0``, the token embeddings, to ``hidden_states.L`` of its L
layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from excise.errors import ArtefactError
from excise.serve.onnx_component import OnnxComponent
from excise.serve.text_conditioning import TIME_IDS, TextConditioning
from excise.serve.tokenizer import PromptTokenizer

#: The output that holds a prompt's vector.
POOLED = "text_embeds"


@dataclass(frozen=True)
class TextEncoder:
    """An encoder with the tokenizer of its prompts."""

    tokenizer: PromptTokenizer
    component: OnnxComponent


def encode_texts(prompts: Sequence[str], encoders: Sequence[TextEncoder], batch_size: int) -> TextConditioning:
    """Of at least one prompt; each distinct one is computed once, ``batch_size`` at a time.

    Args:
        encoders: one, or SDXL's two.

    Raises:
        PromptTooLong, UsageError: as the tokenizers do, before anything is computed.
        ArtefactError: an encoder can't be run.
    """
    distinct = {prompt: row for row, prompt in enumerate(dict.fromkeys(prompts))}
    ids = [encoder.tokenizer.encode(list(distinct)) for encoder in encoders]
    components = [encoder.component for encoder in encoders]
    parts = [
        _encoded(components, [rows[start : start + batch_size] for rows in ids])
        for start in range(0, len(distinct), batch_size)
    ]
    return TextConditioning.joined(parts)[[distinct[prompt] for prompt in prompts]]


def _encoded(components: Sequence[OnnxComponent], ids: Sequence[npt.NDArray[np.int64]]) -> TextConditioning:
    if len(components) == 1:
        return TextConditioning(components[0](input_ids=ids[0]))
    first, second = components
    (states,) = first.run([penultimate(first)], input_ids=ids[0])
    others, pooled = second.run([penultimate(second), POOLED], input_ids=ids[1])
    return TextConditioning(np.concatenate([states, others], axis=-1), pooled)


def penultimate(component: OnnxComponent) -> str:
    """The output with the last but one of an encoder's hidden states.

    Raises:
        ArtefactError: it gives none, as an export without ``output_hidden_states`` doesn't.
    """
    layers = component.config.get("num_hidden_layers")
    name = f"hidden_states.{layers - 1}" if isinstance(layers, int) else "hidden_states of its last layer but one"
    if name not in component.outputs:
        raise ArtefactError(
            f"{component.file} has no output {name}, only {', '.join(component.outputs)}: SDXL reads that, export the "
            "model with excise export"
        )
    return name


def check_widths(unet: OnnxComponent, first: OnnxComponent, second: OnnxComponent) -> None:
    """Whether SDXL's text encoders give what its UNet reads, as far as both declare it.

    Raises:
        ArtefactError: they don't, or the UNet reads other sizes than SDXL's (its refiner does).
    """
    states = [component.outputs[penultimate(component)] for component in (first, second)]
    joined = None if None in states else sum(size for size in states if size is not None)
    for name, axis, given in (
        ("encoder_hidden_states", 2, joined),
        ("text_embeds", 1, second.outputs[POOLED]),
        ("time_ids", 1, TIME_IDS),
    ):
        wanted = unet.width(name, axis)
        if None not in (wanted, given) and wanted != given:
            raise ArtefactError(
                f"{unet.file} reads {name} of width {wanted}, and this pipeline has {given}: name one model's export"
            )
