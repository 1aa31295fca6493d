"""KServe's protocol, version 2, as Triton speaks it over HTTP: what ``tritonclient.http`` needs of a server.

A model has one version, ``1``. Its configuration is in Triton's words, with the parameter ``excise.edit_id``. A row's
missing seed is ``seed + row`` of a random ``seed``, which the answer's parameter ``excise.seed`` names.
Source: KServe, "Open Inference Protocol (V2)"; Triton, "Model Configuration Extension", "Model Repository Extension"
and "Binary Tensor Data Extension".
"""

from __future__ import annotations

import asyncio
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from excise import __version__
from excise.onnx_metadata import EDIT_ID
from excise.serve.engine import Served, ServedEdit
from excise.serve.http_errors import KSERVE_ERRORS, RequestRefused, json_response, quoted
from excise.serve.http_generation import Generator
from excise.serve.http_health import Readiness
from excise.serve.http_kserve_tensors import HEADER_LENGTH, INPUTS, OUTPUT, InferBody, answer, read_body
from excise.serve.http_limits import Wanted, check_n, deadline_of, random_seed, within_limits
from excise.serve.http_models import Models, TenantModels
from excise.serve.http_settings import ServerSettings

VERSION = "1"

_TRITON_TYPES = {"BYTES": "TYPE_STRING", "INT64": "TYPE_INT64", "INT32": "TYPE_INT32", "FP32": "TYPE_FP32"}


def kserve_router(generator: Generator, models: TenantModels, readiness: Readiness) -> APIRouter:
    """The routes below ``/v2``."""
    router = APIRouter(tags=["kserve"])
    settings = generator.settings

    @router.get("/v2", summary="The server", responses=KSERVE_ERRORS)
    async def server() -> Response:
        extensions = ["binary_tensor_data", "model_configuration", "model_repository"]
        return json_response({"name": "excise", "version": __version__, "extensions": extensions})

    @router.get("/v2/health/live", summary="The process answers", responses=KSERVE_ERRORS)
    async def live() -> Response:
        return json_response({"live": True})

    @router.get("/v2/health/ready", summary="As /readyz", responses=KSERVE_ERRORS)
    async def ready() -> Response:
        return json_response({"ready": True}) if readiness.ready else readiness.failure().response("/v2")

    @router.post("/v2/repository/index", summary="The models", responses=KSERVE_ERRORS)
    async def index(request: Request) -> Response:
        state = "READY" if readiness.ready else "UNAVAILABLE"
        own = models.of(request).names
        return json_response([{"name": name, "version": VERSION, "state": state} for name in own])

    def both(suffix: str) -> tuple[str, str]:
        """A model's route without and with its version."""
        return f"/v2/models/{{model}}{suffix}", f"/v2/models/{{model}}/versions/{{version}}{suffix}"

    def found(request: Request, model: str, version: str) -> ServedEdit:
        if version != VERSION:
            raise RequestRefused(
                f"version {quoted(version)!r} isn't served here: the version is {VERSION}",
                status=404,
                code="version_not_found",
            )
        return models.of(request).model(model)

    async def show(request: Request, model: str, version: str = VERSION) -> Response:
        found(request, model, version)
        return json_response(_metadata(models.served, model))

    async def model_ready(request: Request, model: str, version: str = VERSION) -> Response:
        found(request, model, version)
        return await ready()

    async def config(request: Request, model: str, version: str = VERSION) -> Response:
        return json_response(_config(settings, models.served, model, found(request, model, version)))

    async def infer(request: Request, model: str, version: str = VERSION) -> Response:
        found(request, model, version)
        _check_type(request.headers.get("content-type", ""))
        body, values = read_body(await request.body(), request.headers.get(HEADER_LENGTH))
        binary = body.binary
        wanted = _wanted(settings, models.of(request), model, values)
        deadline = deadline_of(settings, request.headers, body.timeout)
        generation = generator.begin(request, wanted, protocol="kserve", deadline=deadline)
        images = [one.image for one in await generation.finish()]
        ids = {one.edit.id or "" for one in wanted}
        parameters: dict[str, Any] = {"excise.seed": wanted[0].seed}
        if len(ids) == 1:
            parameters[EDIT_ID] = ids.pop()
        document = {
            **({} if body.id is None else {"id": body.id}),
            "model_name": model,
            "model_version": VERSION,
            "parameters": parameters,
        }
        content, headers = await asyncio.to_thread(answer, document, images, binary=binary)
        return Response(content, headers={"cache-control": "no-store", **headers})

    for path in both(""):
        router.add_api_route(path, show, summary="A model's inputs and outputs", responses=KSERVE_ERRORS)
    for path in both("/ready"):
        router.add_api_route(path, model_ready, summary="As /readyz", responses=KSERVE_ERRORS)
    for path in both("/config"):
        router.add_api_route(path, config, summary="A model's configuration, as Triton's", responses=KSERVE_ERRORS)
    for path in both("/infer"):
        router.add_api_route(
            path,
            infer,
            methods=["POST"],
            summary="Images of prompts",
            responses={**KSERVE_ERRORS, 200: {"content": {"application/octet-stream": {}, "application/json": {}}}},
            openapi_extra={
                "requestBody": {
                    "required": True,
                    "content": {"application/json": {"schema": _inlined(InferBody.model_json_schema())}},
                }
            },
        )
    return router


def _check_type(content_type: str) -> None:
    """Raise ``RequestRefused`` for what a page of another site can send without asking: forms and plain text."""
    kind = content_type.partition(";")[0].strip().lower()
    if kind not in ("", "application/json", "application/octet-stream"):
        raise RequestRefused(
            f"content-type {quoted(kind)!r} isn't read here: send application/json, or application/octet-stream with "
            f"the header {HEADER_LENGTH}",
            status=415,
            code="unsupported_media_type",
        )


def _wanted(settings: ServerSettings, models: Models, model: str, values: dict[str, list[Any]]) -> list[Wanted]:
    """The images of a request, one for each row. Raises ``RequestRefused``."""
    n = len(values["PROMPT"])
    check_n(settings, n, "rows of PROMPT")
    first = random_seed(n) if "SEED" not in values else 0
    columns: dict[str, list[Any]] = {name: values.get(name, [None] * n) for name in INPUTS}
    columns["SEED"] = values.get("SEED", list(range(first, first + n)))
    return [
        within_limits(
            settings,
            models.choose(model, edit, "EDIT"),
            prompt=prompt,
            negative_prompt=negative_prompt,
            seed=seed,
            steps=steps,
            guidance_scale=guidance_scale,
            param=str.upper,
        )
        for prompt, negative_prompt, seed, steps, guidance_scale, edit in zip(*columns.values(), strict=True)
    ]


def _metadata(served: Served, name: str) -> dict[str, Any]:
    return {
        "name": name,
        "versions": [VERSION],
        "platform": "excise",
        "inputs": [{"name": one, "datatype": kind, "shape": [-1, 1]} for one, kind in INPUTS.items()],
        "outputs": [{"name": OUTPUT, "datatype": "UINT8", "shape": [-1, *served.image_shape]}],
    }


def _config(settings: ServerSettings, served: Served, name: str, edit: ServedEdit) -> dict[str, Any]:
    """As Triton gives it: 64-bit integers are strings in its JSON, which these dimensions needn't be."""
    texts = {EDIT_ID: edit.id, "excise.edit": edit.name, "excise.manifest": served.manifest}
    return {
        "name": name,
        "platform": "",
        "backend": "excise",
        "version_policy": {"latest": {"num_versions": 1}},
        "max_batch_size": settings.max_n,
        "input": [
            {"name": one, "data_type": _TRITON_TYPES[kind], "dims": [1], "optional": one != "PROMPT"}
            for one, kind in INPUTS.items()
        ],
        "output": [{"name": OUTPUT, "data_type": "TYPE_UINT8", "dims": list(served.image_shape)}],
        "parameters": {key: {"string_value": text} for key, text in texts.items() if text},
    }


def _inlined(schema: dict[str, Any]) -> dict[str, Any]:
    """A schema without references to definitions of its own, which an OpenAPI document would look for elsewhere."""
    definitions: dict[str, Any] = schema.pop("$defs", {})

    def resolved(part: Any) -> Any:
        if isinstance(part, list):
            return [resolved(one) for one in part]
        if not isinstance(part, dict):
            return part
        if isinstance(reference := part.get("$ref"), str):
            name = reference.rpartition("/")[2]
            # JsonValue's own definition is empty: anything.
            return {} if name == "JsonValue" else resolved(definitions[name])
        return {key: resolved(value) for key, value in part.items()}

    return dict(resolved(schema))
