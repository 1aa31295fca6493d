"""The runtimes of an evaluation by name: ``NAME=KIND:PLACE?OPTIONS``.

    edited=torch:DIR?device=cuda&dtype=float16&edit=FILE    a diffusers folder; an edit is applied in memory
    filtered=torch:DIR?filter=nudenet                       behind an output filter; or safety-checker:DIR
    served=onnx:DIR?provider=cuda                           an export in ONNX Runtime
    server=triton:http://HOST:8000/MODEL                    a model of a Triton server
    server=openai:http://HOST:8000?size=512x512             an endpoint with OpenAI's image API

``demo:model`` stands for the bundled model, and a bare folder is recognised by what it holds.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, cast, get_args
from urllib.parse import parse_qsl, urlencode

from excise.errors import UsageError
from excise.eval.endpoint_http import Endpoint, check_url
from excise.eval.verification_sides import SIDE_OPTIONS, SideSpec, parse_side

Kind = Literal["torch", "onnx", "tensorrt", "triton", "openai"]

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,39}")


def _number(least: int) -> Callable[[str], bool]:
    return lambda value: value.isascii() and value.isdigit() and least <= int(value) <= 10**6


def _seconds(value: str) -> bool:
    try:
        return 0 < float(value) < math.inf
    except ValueError:
        return False


#: Options that an evaluation adds to those of ``parse_side``: what a value has to be, in words and as a test.
_VALUES: Mapping[str, tuple[str, Callable[[str], bool]]] = {
    "batch_size": ("an integer from 1", _number(1)),
    "threads": ("an integer from 1", _number(1)),
    "concurrency": ("an integer from 1 to 64", lambda value: _number(1)(value) and int(value) <= 64),
    "retries": ("an integer from 0", _number(0)),
    "timeout": ("a number of seconds", _seconds),
    "size": ("WIDTHxHEIGHT", lambda value: re.fullmatch(r"[1-9]\d{0,4}x[1-9]\d{0,4}", value) is not None),
    "model": ("a name", bool),
    "filter": (
        "nudenet or safety-checker:DIR",
        lambda value: re.fullmatch("nudenet|safety-checker:.+", value) is not None,
    ),
    "key_env": ("the name of an environment variable", lambda value: re.fullmatch(r"[A-Za-z_]\w*", value) is not None),
}
_ENDPOINT = ("concurrency", "retries", "timeout", "key_env")
_OPTIONS: Mapping[Kind, tuple[str, ...]] = {
    "torch": ("batch_size", "threads", "filter"),
    "onnx": ("batch_size", "threads", "filter"),
    "tensorrt": (),
    "triton": ("batch_size", *_ENDPOINT),
    "openai": ("model", "size", *_ENDPOINT),
}


@dataclass(frozen=True)
class RuntimeSpec:
    """``NAME=KIND:PLACE?OPTIONS``, parsed. ``str`` gives it without the name, as given."""

    name: str  #: as in reports, and of the folder with its images
    kind: Kind
    place: str  #: a folder, a server's address, or ADDRESS/MODEL
    options: dict[str, str] = field(default_factory=dict)
    source: str = ""  #: as given

    def __str__(self) -> str:
        return self.source

    @property
    def side(self) -> SideSpec:
        """Of a folder of torch or ONNX: what ``verification_sides`` opens."""
        return SideSpec(
            cast(Literal["torch", "onnx"], self.kind),
            Path(self.place),
            {name: value for name, value in self.options.items() if name not in _VALUES},
        )

    @property
    def endpoint(self) -> Endpoint:
        """Of a server: its address and how patiently it is asked.

        Raises:
            UsageError: the variable that ``key_env`` names isn't set.
            MissingExtra: httpx isn't installed.
        """
        address = self.place.rpartition("/")[0] if self.kind == "triton" else self.place
        given = self.options
        plain = Endpoint(address, key_env=given.get("key_env"))
        return Endpoint(
            address,
            timeout=float(given.get("timeout", plain.timeout)),
            retries=int(given.get("retries", plain.retries)),
            key_env=plain.key_env,
        )

    def number(self, option: str, default: int) -> int:
        """An option's whole number."""
        return int(self.options.get(option, default))


def parse_runtime(text: str) -> RuntimeSpec:
    """``NAME=KIND:PLACE?OPTIONS``, without looking further than whether a bare folder is a pipeline.

    Raises:
        UsageError: no name, or one that can't name a folder; an unknown kind, option or value; no http address.
    """
    name, equals, source = text.partition("=")
    if not equals or ":" in name or "/" in name or not source:
        raise UsageError(f"{text!r} has no name: write NAME=KIND:PLACE, such as served=onnx:DIR")
    if not _NAME.fullmatch(name):
        raise UsageError(f"{name!r} can't name a runtime: letters, digits, '.', '_' and '-', at most 40")
    address, _, query = source.partition("?")
    kind, place = _placed(address)
    options = dict(parse_qsl(query, keep_blank_values=True))
    offered = (*SIDE_OPTIONS.get(kind, ()), *_OPTIONS[kind])
    for option, value in options.items():
        if option not in offered:
            raise UsageError(f"{text}: {kind} has no option {option!r}, only {', '.join(offered) or 'a folder'}")
        wanted, sound = _VALUES.get(option, ("", bool))
        if option in _VALUES and not sound(value):
            raise UsageError(f"{text}: {option}={value!r} isn't {wanted}")
    sides = {option: value for option, value in options.items() if option not in _VALUES}
    if sides:
        parse_side(with_options(f"{kind}:{place}", sides))
    return RuntimeSpec(name, kind, place, options, source)


def _placed(address: str) -> tuple[Kind, str]:
    """Kind and place of ``KIND:PLACE`` or a bare folder."""
    given, colon, rest = address.partition(":")
    if colon and given in ("triton", "openai"):
        place = rest.rstrip("/")
        url = place.rpartition("/")[0] if given == "triton" else place
        if given == "triton" and url in ("http:/", "https:/"):
            raise UsageError(f"{address} names no model: write triton:http://HOST:PORT/MODEL")
        check_url(url if url and "://" in place else place)
        return cast(Kind, given), place
    if colon and given == "tensorrt":
        return "tensorrt", rest
    if colon and given not in SIDE_OPTIONS and address != "demo:model" and not Path(address).exists():
        raise UsageError(f"{address}: {given!r} isn't one of {', '.join(get_args(Kind))}")
    side = parse_side(address)
    return side.kind, str(side.folder)


def with_options(place: str, options: Mapping[str, str]) -> str:
    """``PLACE?OPTIONS`` as ``parse_runtime`` reads it back; the place alone without options."""
    return f"{place}?{urlencode(options, safe='/:')}" if options else place


def parse_runtimes(texts: Sequence[str]) -> tuple[RuntimeSpec, ...]:
    """Several, in their order.

    Raises:
        UsageError: as ``parse_runtime``; none, or two of one name.
    """
    specs = tuple(parse_runtime(text) for text in texts)
    names = [spec.name.casefold() for spec in specs]  # one folder where a file system doesn't tell cases apart
    if repeated := next((spec.name for spec in specs if names.count(spec.name.casefold()) > 1), None):
        raise UsageError(f"two runtimes are called {repeated!r}: give each its own name")
    if not specs:
        raise UsageError("no runtime was named: write NAME=KIND:PLACE, such as served=onnx:DIR")
    return specs
