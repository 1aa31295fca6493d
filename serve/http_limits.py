"""What the operator's limits leave of a request's values, whichever protocol they came by."""

from __future__ import annotations

import math
import secrets
from collections.abc import Callable
from dataclasses import dataclass

from starlette.datastructures import Headers

from excise.serve.denoising import LARGEST_KEY
from excise.serve.engine import ServedEdit
from excise.serve.http_errors import RequestRefused, quoted
from excise.serve.http_settings import ServerSettings

#: The header by which a request asks for an earlier deadline, in seconds.
DEADLINE = "x-request-timeout"

#: Random seeds are below this, so that every JSON reader keeps them exactly.
_RANDOM_SEEDS = 2**53


@dataclass(frozen=True)
class Wanted:
    """One image that a request asks for, within the limits."""

    prompt: str
    negative_prompt: str
    seed: int
    steps: int
    guidance_scale: float
    edit: ServedEdit


def within_limits(
    settings: ServerSettings,
    edit: ServedEdit,
    *,
    prompt: str,
    negative_prompt: str | None,
    seed: int,
    steps: int | None,
    guidance_scale: float | None,
    param: Callable[[str], str] = str,
) -> Wanted:
    """One image with the operator's defaults for what is None; ``param`` gives a value's name in the protocol.

    Raises:
        RequestRefused: A value is outside its limits, or a prompt isn't text.
    """
    for name, text in (("prompt", prompt), ("negative_prompt", negative_prompt or "")):
        _check_text(text, settings.max_prompt_characters, param(name))
    steps = settings.default_steps if steps is None else steps
    scale = settings.default_guidance_scale if guidance_scale is None else guidance_scale
    if not 1 <= steps <= settings.max_steps:
        raise _outside(param("num_inference_steps"), steps, f"an integer from 1 to {settings.max_steps}")
    # A negative scale would turn prompt and negative prompt round.
    if not (math.isfinite(scale) and 0 <= scale <= settings.max_guidance_scale):
        raise _outside(param("guidance_scale"), scale, f"a number from 0 to {settings.max_guidance_scale:g}")
    if not 0 <= seed <= LARGEST_KEY:
        raise _outside(param("seed"), seed, f"an integer from 0 to {LARGEST_KEY}")
    return Wanted(prompt, negative_prompt or "", seed, steps, float(scale), edit)


def check_n(settings: ServerSettings, n: int, param: str) -> None:
    """Raise ``RequestRefused`` for a number of images that isn't allowed."""
    if not 1 <= n <= settings.max_n:
        raise _outside(param, n, f"an integer from 1 to {settings.max_n}")


def random_seed(n: int) -> int:
    """The first of n consecutive seeds that nobody can foresee."""
    return secrets.randbelow(_RANDOM_SEEDS - n)


def deadline_of(settings: ServerSettings, headers: Headers, asked: float | None = None) -> float | None:
    """Seconds from now: the least of the operator's, the header's and what the protocol ``asked``.

    Raises:
        RequestRefused: The header isn't a positive number of seconds.
    """
    limits = [settings.deadline, asked]
    if (text := headers.get(DEADLINE)) is not None:
        try:
            seconds = float(text)
        except ValueError:
            seconds = math.nan
        if not (math.isfinite(seconds) and seconds > 0):
            raise _outside(DEADLINE, text, "a positive number of seconds")
        limits.append(seconds)
    return min((limit for limit in limits if limit is not None), default=None)


def _check_text(text: str, longest: int, param: str) -> None:
    if len(text) > longest:
        raise RequestRefused(
            f"{param} has {len(text)} characters: give at most {longest}", code="prompt_too_long", param=param
        )
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RequestRefused(f"{param} isn't valid Unicode text", param=param) from error


def _outside(param: str, value: object, wanted: str) -> RequestRefused:
    return RequestRefused(f"{param}={quoted(value)}: give {wanted}", param=param)
