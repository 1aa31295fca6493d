"""OpenAI's image API: ``POST /v1/images/generations`` and ``GET /v1/models``.

Of n images, the i-th has the seed ``seed + i``, so that each can be made again alone. Without a seed a random one is
chosen; the answer says which. The extensions ``seed``, ``num_inference_steps``, ``guidance_scale``,
``negative_prompt`` and ``edit`` are those of servers of open models; ``edit`` is excise's own.
Source: OpenAI's API reference, "Create image" and "Image streaming".
"""

from __future__ import annotations

import asyncio
import base64
import time
from typing import Any

from fastapi import APIRouter
from pydantic import ValidationError
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from excise.serve.http_access import log_failure
from excise.serve.http_errors import OPENAI_ERRORS, RequestRefused, failure_of, json_response, quoted, refused_by
from excise.serve.http_events import Events
from excise.serve.http_generation import Generated, Generator
from excise.serve.http_limits import Wanted, check_n, deadline_of, random_seed, within_limits
from excise.serve.http_models import SEPARATOR, Models, TenantModels
from excise.serve.http_openai_schema import GenerationBody, ImagesAnswer, request_body
from excise.serve.http_settings import ServerSettings

#: When the model's list entries say that they were made: nobody knows.
_CREATED = 0


def openai_router(generator: Generator, models: TenantModels) -> APIRouter:
    """The routes below ``/v1``."""
    router = APIRouter(tags=["openai"])
    settings = generator.settings
    height, width, _ = models.served.image_shape
    size = f"{width}x{height}"

    @router.post(
        "/v1/images/generations",
        summary="Create images",
        response_model=ImagesAnswer,
        responses={**OPENAI_ERRORS, 200: {"content": {"text/event-stream": {}}}},
        openapi_extra={"requestBody": request_body(settings, models.everybodys, size)},
    )
    async def generate(request: Request) -> Response:
        body = await _body(request)
        wanted = _wanted(settings, models.of(request), body, size)
        deadline = deadline_of(settings, request.headers)
        common = {
            "created": int(time.time()),
            "model": body.model or models.served.model,
            "edit": wanted[0].edit.name,
            "edit_id": wanted[0].edit.id,
            "num_inference_steps": wanted[0].steps,
            "guidance_scale": wanted[0].guidance_scale,
            "seed": wanted[0].seed,
            "size": size,
            "output_format": "png",
        }
        if body.stream:
            events = Events(common, lambda error: _log(settings, request, error))
            generation = generator.begin(request, wanted, protocol="openai", deadline=deadline, on_step=events.step)
            return StreamingResponse(
                events.of(asyncio.create_task(generation.finish())),
                media_type="text/event-stream",
                headers={"cache-control": "no-store", "x-accel-buffering": "no"},
            )
        generation = generator.begin(request, wanted, protocol="openai", deadline=deadline)
        generated = await generation.finish()
        return await asyncio.to_thread(lambda: json_response({**common, "data": [entry(one) for one in generated]}))

    @router.get("/v1/models", summary="The models: each edit is one", responses=OPENAI_ERRORS)
    async def list_models(request: Request) -> Response:
        own = models.of(request)
        return json_response({"object": "list", "data": [_model(settings, own, name) for name in own.names]})

    @router.get("/v1/models/{model}", summary="One model", responses=OPENAI_ERRORS)
    async def show_model(request: Request, model: str) -> Response:
        return json_response(_model(settings, models.of(request), model))

    return router


def entry(one: Generated) -> dict[str, Any]:
    """An image as an answer's ``data`` holds it."""
    return {
        "b64_json": base64.b64encode(one.png()).decode(),
        "seed": one.wanted.seed,
        **({} if one.verdict is None else {"blurred": one.flagged}),
    }


def _log(settings: ServerSettings, request: Request, error: Exception) -> None:
    """An error within a stream, which the access log can't see any more."""
    if failure_of(error).status == 500:
        log_failure(error, request.scope["state"]["request_id"], settings.log_prompts)


async def _body(request: Request) -> GenerationBody:
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise RequestRefused(
            f"content-type {quoted(kind)!r} isn't read here: send application/json",
            status=415,
            code="unsupported_media_type",
        )
    try:
        return GenerationBody.model_validate_json(await request.body())
    except ValidationError as error:
        raise refused_by(error) from error


def _wanted(settings: ServerSettings, models: Models, body: GenerationBody, size: str) -> list[Wanted]:
    """The images of a body, in order. Raises ``RequestRefused``."""
    edit = models.choose(body.model, body.edit)
    if body.size not in (None, "auto", size):
        raise RequestRefused(
            f"size={quoted(body.size)}: this model makes images of {size}, and no others", param="size"
        )
    n = 1 if body.n is None else body.n
    check_n(settings, n, "n")
    seed = random_seed(n) if body.seed is None else body.seed
    return [
        within_limits(
            settings,
            edit,
            prompt=body.prompt,
            negative_prompt=body.negative_prompt,
            seed=seed + place,
            steps=body.num_inference_steps,
            guidance_scale=body.guidance_scale,
        )
        for place in range(n)
    ]


def _model(settings: ServerSettings, models: Models, name: str) -> dict[str, Any]:
    """A model as OpenAI lists it, and what a client has to know of it to ask for an image."""
    edit, served = models.model(name), models.served
    height, width, _ = served.image_shape
    described = {
        one.name: {
            "name": one.name,
            "model": f"{served.model}{SEPARATOR}{one.name}",
            "edit_id": one.id,
            "summary": one.summary,
            "concepts": list(served.concepts.get(one.name, ())),
        }
        for one in served.edits
    }
    return {
        "id": name,
        "object": "model",
        "created": _CREATED,
        "owned_by": "excise",
        "edit": described[edit.name],
        "edits": list(described.values()) if name == served.model else [described[edit.name]],
        "size": f"{width}x{height}",
        "manifest": served.manifest,
        "defaults": {
            "num_inference_steps": settings.default_steps,
            "guidance_scale": settings.default_guidance_scale,
        },
        "limits": {
            "n": settings.max_n,
            "num_inference_steps": settings.max_steps,
            "guidance_scale": settings.max_guidance_scale,
            "prompt_characters": settings.max_prompt_characters,
            "prompt_tokens": served.max_prompt_tokens,
        },
    }
