"""How a model is exported: a small YAML file, or the same by keywords.

format: 1
dtype: fp16
static: {batch: 1, height: 512, width: 512}
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from excise.errors import MissingExtra, UsageError

Precision = Literal["fp32", "fp16"]
Side = Annotated[int, Field(ge=8, le=16384, multiple_of=8)]


class _Model(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class StaticShapes(_Model):
    """One size for every request. The text's length is the pipeline's own."""

    batch: int = Field(default=1, ge=1, le=1024, description="rows of every component's batch; guidance takes two")
    height: Side = Field(description="of the image, in pixels: a multiple of 8")
    width: Side = Field(description="of the image, in pixels: a multiple of 8")


class ExportOptions(_Model):
    """Everything about an export but the model, the edit and the place."""

    format: Literal[1] = Field(default=1, description="1, the only format there is")
    dtype: Precision = Field(default="fp32", description="fp32 or fp16: of the text encoders and the denoiser")
    vae_dtype: Precision = Field(
        default="fp32", description="fp32 or fp16: of the VAE; Stable Diffusion's overflows in fp16"
    )
    opset: int | None = Field(
        default=None, ge=14, le=20, description="the ONNX operator set, 14 to 20; by default the one Optimum chooses"
    )
    editable: Literal["text", "all"] = Field(
        default="text",
        description="text or all: which weights a patch can move at once, with their unedited float32 values beside "
        "the model; those that read the text, or every one, for edits by training",
    )
    static: StaticShapes | None = Field(
        default=None, description="fields batch, height and width: fixed shapes; by default every axis is dynamic"
    )


def load_options(path: Path) -> ExportOptions:
    """Options from a YAML file.

    Raises:
        UsageError: The file can't be read, isn't YAML, has no ``format``, or a field has a value that it doesn't take.
        MissingExtra: PyYAML isn't installed.
    """
    try:
        import yaml
    except ModuleNotFoundError as error:
        raise MissingExtra("pyyaml", "export") from error
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} can't be read: {error}") from error
    except yaml.YAMLError as error:
        raise UsageError(f"{path} isn't YAML: {' '.join(str(error).split())}") from error
    if not isinstance(data, dict) or "format" not in data:
        raise UsageError(f"{path} has no format: start with the line format: 1")
    return _validated(data, f"{path}: ")


def make_options(options: ExportOptions | None = None, **given: Any) -> ExportOptions:
    """``options`` with the values of ``given`` that aren't None in their place.

    Raises:
        UsageError: A field has a value that it doesn't take.
    """
    base = (options or ExportOptions()).model_dump()
    return _validated({**base, **{name: value for name, value in given.items() if value is not None}}, "")


def _validated(data: dict[Any, Any], source: str) -> ExportOptions:
    """The options, or the first thing that is wrong with them on one line."""
    try:
        return ExportOptions.model_validate(data)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(str(part) for part in first["loc"])
        problem = first["msg"].removeprefix("Value error, ")
        if first["type"] == "extra_forbidden":
            known = ", ".join(_fields(first["loc"][:-1]))
            raise UsageError(f"{source}{name}: there is no such option; the options are {known}") from error
        value = "" if first["type"] == "missing" or not name else f" {first['input']!r}"
        raise UsageError(f"{source}{name}{value}: {problem}".replace(": : ", ": ")) from error


def _fields(place: tuple[Any, ...]) -> list[str]:
    """Names of the options at a place: the file's own, or those of ``static``."""
    return list((StaticShapes if place else ExportOptions).model_fields)
