"""What the texts of requests become: each image's prompt, its negative prompt, and what the guidance adds to all."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from excise.errors import UsageError
from excise.serve.noise_schedule import Array
from excise.serve.runtime import Request
from excise.serve.text_conditioning import TextConditioning


class RequestTexts(NamedTuple):
    """Of n images.

    Attributes:
        negative: of n negative prompts.
        prompts: of n prompts.
        guidance: of the texts that every image is denoised with besides; None where there are none.
    """

    negative: TextConditioning
    prompts: TextConditioning
    guidance: TextConditioning | None = None

    def of(self, images: slice) -> RequestTexts:
        """Of these images only."""
        return RequestTexts(self.negative[images], self.prompts[images], self.guidance)


def request_texts(
    requests: Sequence[Request],
    guidance_texts: Sequence[str],
    condition: Callable[[Sequence[str]], TextConditioning],
    *,
    prompt_embeds: Array | None = None,
    pooled: bool = False,
    zeros_for_empty_negative: bool = False,
) -> RequestTexts:
    """The texts of at least one request, computed together.

    Args:
        requests: whose prompts they are.
        guidance_texts: the guidance's own.
        condition: the text encoders.
        prompt_embeds: with shape (n, t, d), in place of the prompts' hidden states.
        pooled: whether prompts have vectors, too; with ``prompt_embeds`` they stay the prompts'.
        zeros_for_empty_negative: zeros in place of what an empty negative prompt becomes.

    Raises:
        PromptTooLong, UsageError: as ``condition`` does.
        UsageError: ``prompt_embeds`` of another shape.
    """
    texts = [*guidance_texts, *(request.negative_prompt for request in requests)]
    if prompt_embeds is None or pooled:
        texts += [request.prompt for request in requests]
    found, first = condition(texts), len(guidance_texts)
    negative, prompts = found[first : first + len(requests)], found[first + len(requests) :]
    if prompt_embeds is not None:
        if prompt_embeds.shape != negative.embeds.shape:
            raise UsageError(f"prompt_embeds has shape {prompt_embeds.shape}: give {negative.embeds.shape}")
        prompts = TextConditioning(np.asarray(prompt_embeds, np.float32), prompts.pooled)
    if zeros_for_empty_negative:
        negative = negative.zeroed([not request.negative_prompt for request in requests])
    return RequestTexts(negative, prompts, found[:first] if first else None)
