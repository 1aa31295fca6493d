"""What a Triton request asks for: its tensors, read and checked, so that a batch takes only what can be made.

    PROMPT               BYTES  (n, 1)
    NEGATIVE_PROMPT      BYTES  (n, 1)   optional: empty
    SEED                 INT64  (n, 1)   optional: 0
    NUM_INFERENCE_STEPS  INT32  (n, 1)   optional: the model's default; one number for the whole request
    GUIDANCE_SCALE       FP32   (n, 1)   optional: the model's default
    EDIT                 BYTES  (n, 1)   optional, or empty: the default, of ``excise.edits`` or of the tenant's

The tenant, of a version with a ``policy.json``, is the request parameter ``tenant``: a gateway that knows who asks has
to set it, and must not let clients do so.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from excise.errors import UsageError
from excise.printable import printable
from excise.serve.denoising import check_requests
from excise.serve.edit_policy import EditPolicy
from excise.serve.runtime import Request
from excise.serve.schedulers import Scheduler
from excise.serve.tokenizer import PromptTokenizer
from excise.serve.triton_settings import Settings


@dataclass(frozen=True)
class Asked:
    """The images of one request, which are denoised with the same number of steps."""

    requests: tuple[Request, ...]
    num_inference_steps: int
    guidance_scales: tuple[float, ...]


class Checks(Protocol):
    """What of a runtime decides whether a request can be carried out."""

    scheduler: Scheduler
    tokenizer: PromptTokenizer


def read_request(
    request: Any, pb_utils: Any, settings: Settings, runtime: Checks, policy: EditPolicy | None = None
) -> Asked:
    """One of ``execute``'s requests.

    Raises:
        UsageError: anything that it can't have; the message names the tensor and the value.
    """
    prompts = _texts(request, pb_utils, "PROMPT")
    if prompts is None:
        raise UsageError("PROMPT is missing: give BYTES with shape (n, 1)")
    n = len(prompts)

    def column(name: str, default: Any) -> list[Any]:
        values = _numbers(request, pb_utils, name)
        return [default] * n if values is None else _n(name, values, n)

    negative = _n("NEGATIVE_PROMPT", _texts(request, pb_utils, "NEGATIVE_PROMPT") or [""] * n, n)
    seeds = column("SEED", 0)
    steps = set(column("NUM_INFERENCE_STEPS", settings.default_steps))
    scales = [float(scale) for scale in column("GUIDANCE_SCALE", settings.default_guidance_scale)]
    named = _n("EDIT", _texts(request, pb_utils, "EDIT") or [""] * n, n)
    if len(steps) > 1:
        raise UsageError(
            f"NUM_INFERENCE_STEPS has {sorted(steps)} in one request: the images of a request share one number"
        )
    (count,) = (int(one) for one in steps)
    if count > settings.max_steps:
        raise UsageError(f"NUM_INFERENCE_STEPS={count}: this server takes at most {settings.max_steps}")
    runtime.scheduler.start(count)
    for name, texts in (("PROMPT", prompts), ("NEGATIVE_PROMPT", negative)):
        if (longest := max(map(len, texts))) > settings.max_prompt_characters:
            raise UsageError(
                f"{name} has {longest} characters: this server takes at most {settings.max_prompt_characters}"
            )
        runtime.tokenizer.encode(texts)
    tenant = _tenant(request) if policy is not None else None
    requests = tuple(
        Request(prompt, without, int(seed), edit=_edit(name, settings, policy, tenant))
        for prompt, without, seed, name in zip(prompts, negative, seeds, named, strict=True)
    )
    check_requests(requests, scales)
    return Asked(requests, count, tuple(scales))


def _edit(name: str, settings: Settings, policy: EditPolicy | None, tenant: str | None) -> str | None:
    """The id of the edit of that name, "" for none named."""
    if policy is not None:
        name = policy.choose(tenant, name or None)
    if not name:
        return next(iter(settings.edits.values()), None)
    if name not in settings.edits:
        known = ", ".join(settings.edits) or "none"
        raise UsageError(f"EDIT={printable(name[:80])!r} isn't served here: name one of {known}")
    return settings.edits[name]


def _tenant(request: Any) -> str | None:
    """The request parameter ``tenant``, None where there is none."""
    text = request.parameters() if hasattr(request, "parameters") else ""
    try:
        value = json.loads(text or "{}").get("tenant")
    except (ValueError, AttributeError):
        return None
    return value if isinstance(value, str) and value else None


def _numbers(request: Any, pb_utils: Any, name: str) -> list[Any] | None:
    tensor = pb_utils.get_input_tensor_by_name(request, name)
    if tensor is None:
        return None
    values = np.asarray(tensor.as_numpy())
    if values.ndim != 2 or values.shape[1] != 1 or not len(values):
        raise UsageError(f"{name} has shape {values.shape}: give (n, 1)")
    return list(values[:, 0].tolist())


def _texts(request: Any, pb_utils: Any, name: str) -> list[str] | None:
    values = _numbers(request, pb_utils, name)
    if values is None:
        return None
    try:
        return [one.decode() if isinstance(one, bytes) else str(one) for one in values]
    except UnicodeDecodeError as error:
        raise UsageError(f"{name} isn't UTF-8 ({error.reason} at byte {error.start})") from error


def _n(name: str, values: Sequence[Any], n: int) -> list[Any]:
    if len(values) != n:
        raise UsageError(f"{name} has {len(values)} rows, and PROMPT {n}: give as many")
    return list(values)
