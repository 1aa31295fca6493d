"""What every command shares: lines on stderr, results on stdout, and errors for libraries that aren't installed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import click

from excise.errors import MissingExtra

#: Library that a command needs → the extra that installs it.
EXTRAS = {
    "torch": "edit",
    "diffusers": "edit",
    "transformers": "edit",
    "huggingface_hub": "edit",
    "optimum": "export",
    "onnx": "export",
    "scipy": "eval",
    "cleanfid": "eval",
    "torchvision": "eval",
    "jinja2": "eval",
    "matplotlib": "eval",
    "yaml": "edit",
    "fastapi": "serve",
    "uvicorn": "serve",
    "prometheus_client": "serve",
    "h11": "serve",
    "httpx": "eval",
    "lpips": "eval",
    "nudenet": "eval",
    "ray": "ray",
}


@contextmanager
def needs(extras: str = "") -> Iterator[None]:
    """Around a room's import: a missing library becomes ``MissingExtra`` with the command that installs it.

    ``extras`` are the ones to name; by default the missing library's own.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        library = (error.name or "").split(".")[0]
        if library not in EXTRAS:
            raise
        raise MissingExtra(library, extras or EXTRAS[library]) from error


def say(message: str) -> None:
    """One line of progress on stderr."""
    click.echo(f"excise: {message}", err=True)


def result(document: dict[str, Any], text: str, as_json: bool) -> None:
    """A command's result on stdout: one JSON document, or text for people."""
    click.echo(json.dumps(document, indent=2, ensure_ascii=False) if as_json else text)


json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON document instead of text.")
force_option = click.option("--force", is_flag=True, help="Apply the edit although the model's fingerprint differs.")
