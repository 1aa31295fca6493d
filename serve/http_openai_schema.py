"""What OpenAI's image API is asked for and answers here, as schemas.

Source: OpenAI's API reference, "Create image".
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from excise.serve.denoising import LARGEST_KEY
from excise.serve.http_models import Models
from excise.serve.http_settings import ServerSettings


class GenerationBody(BaseModel):
    """What is asked for. Fields that this server couldn't honour are refused instead of passed over."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, title="ImageGeneration")

    prompt: str
    model: str | None = Field(None, description="MODEL, or MODEL@EDIT; left out, the model that there is")
    n: int | None = Field(None, ge=1, description="images, with the seeds seed, seed + 1, …; 1 if left out")
    size: str | None = Field(None, description="the model's own, or auto")
    response_format: Literal["b64_json"] | None = None
    output_format: Literal["png"] | None = None
    stream: bool | None = Field(None, description="server-sent events: progress, then the images")
    seed: int | None = Field(None, ge=0, le=LARGEST_KEY, description="random if left out; the answer says which")
    num_inference_steps: int | None = Field(None, ge=1)
    guidance_scale: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None
    negative_prompt: str | None = None
    edit: str | None = Field(None, description="the name of an edit; left out, the model's default")
    user: str | None = Field(None, description="not used")
    quality: Literal["auto", "standard"] | None = None
    background: Literal["auto", "opaque"] | None = None
    moderation: Literal["auto"] | None = None
    partial_images: int | None = Field(None, ge=0, le=0)


class ImageEntry(BaseModel):
    """One image of an answer."""

    b64_json: str
    seed: int
    blurred: bool | None = Field(None, description="whether the output filter hid it; absent without a filter")


class ImagesAnswer(BaseModel):
    """The images, and with which values each can be made again."""

    created: int
    model: str
    edit: str
    edit_id: str | None
    num_inference_steps: int
    guidance_scale: float
    seed: int
    size: str
    output_format: Literal["png"]
    data: list[ImageEntry]


def request_body(settings: ServerSettings, models: Models | None, size: str) -> dict[str, Any]:
    """The body's schema with this server's limits; ``models`` None where their names aren't everybody's to know."""
    schema = GenerationBody.model_json_schema()
    limits: dict[str, dict[str, Any]] = {
        "prompt": {"maxLength": settings.max_prompt_characters},
        "negative_prompt": {"maxLength": settings.max_prompt_characters},
        "n": {"maximum": settings.max_n},
        "num_inference_steps": {"maximum": settings.max_steps},
        "guidance_scale": {"maximum": settings.max_guidance_scale},
        "size": {"enum": ["auto", size]},
    }
    if models is not None:
        limits["model"] = {"enum": list(models.names)}
        limits["edit"] = {"enum": ["", *(edit.name for edit in models.served.edits)]}
    for name, limit in limits.items():
        one = schema["properties"][name]
        next(iter(one.get("anyOf", [one]))).update(limit)
    return {"required": True, "content": {"application/json": {"schema": schema}}}
