"""A model of a Triton server as a runtime: ``POST {URL}/v2/models/{MODEL}/infer`` of KServe's protocol, version 2.

Tensors are JSON, with a batch of n requests in their first dimension:

    PROMPT               BYTES  (n, 1)
    NEGATIVE_PROMPT      BYTES  (n, 1)
    SEED                 INT64  (n, 1)     the initial latents are those of ``serve.runtime.initial_latents``, index 0
    NUM_INFERENCE_STEPS  INT32  (n, 1)
    GUIDANCE_SCALE       FP32   (n, 1)
    → IMAGES             UINT8  (n, height, width, 3)

The edit that the model says it carries is the parameter ``excise.edit_id`` of its configuration, which Triton gives at
``GET /v2/models/{MODEL}/config``. Source: KServe, "Open Inference Protocol (V2)"; Triton's model configuration
extension.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from urllib.parse import quote

import numpy as np

from excise.errors import ArtefactError
from excise.eval.endpoint_http import Endpoint, Session
from excise.eval.endpoint_runtime import EndpointRuntime, Images
from excise.onnx_metadata import EDIT_ID
from excise.serve.runtime import Request

OUTPUT = "IMAGES"


class TritonRuntime(EndpointRuntime):
    """Images of one model of a server.

    Args:
        endpoint: the server's address.
        model: its name there.
        name: as in reports.
        batch_size: images asked for together, at most the model's ``max_batch_size``.
        concurrency: how many such batches are under way at a time.
    """

    def __init__(self, endpoint: Endpoint, model: str, *, name: str, batch_size: int = 1, concurrency: int = 1) -> None:
        super().__init__(endpoint, name=name, batch_size=batch_size, concurrency=concurrency)
        self._path = model_path(model)

    def _ask(
        self, session: Session, requests: Sequence[Request], num_inference_steps: int, guidance_scale: float
    ) -> list[Images]:
        n = len(requests)
        columns: list[tuple[str, str, list[Any]]] = [
            ("PROMPT", "BYTES", [request.prompt for request in requests]),
            ("NEGATIVE_PROMPT", "BYTES", [request.negative_prompt for request in requests]),
            ("SEED", "INT64", [int(request.seed) for request in requests]),
            ("NUM_INFERENCE_STEPS", "INT32", [num_inference_steps] * n),
            ("GUIDANCE_SCALE", "FP32", [guidance_scale] * n),
        ]
        inputs = [
            {"name": name, "datatype": datatype, "shape": [n, 1], "data": data} for name, datatype, data in columns
        ]
        answer = session.post(f"{self._path}/infer", {"inputs": inputs, "outputs": [{"name": OUTPUT}]})
        return list(_images(answer, n, f"{self.endpoint.url}{self._path}"))


def model_path(model: str) -> str:
    """Where a model is on its server."""
    return f"/v2/models/{quote(model, safe='')}"


def served_edit(endpoint: Endpoint, model: str) -> str | None:
    """The id of the edit that a model's configuration names; None where it, or the server, gives none.

    Raises:
        UsageError, ArtefactError: nothing answers there, or not with JSON.
    """
    with endpoint.session() as session:
        config = session.get(f"{model_path(model)}/config") or {}
    parameters = config.get("parameters")
    entry = parameters.get(EDIT_ID) if isinstance(parameters, dict) else None
    value = entry.get("string_value") if isinstance(entry, dict) else entry
    return value if isinstance(value, str) and value else None


def _images(answer: dict[str, Any], n: int, place: str) -> Images:
    """The tensor ``IMAGES`` of an answer, uint8 with shape (n, height, width, 3); its data may be flat or nested."""
    outputs = answer.get("outputs")
    named = {one.get("name"): one for one in outputs if isinstance(one, dict)} if isinstance(outputs, list) else {}
    if OUTPUT not in named:
        found = ", ".join(str(name) for name in named) or "none"
        raise ArtefactError(f"{place} has no output {OUTPUT} (it gave: {found}): is it a text-to-image model?")
    tensor = named[OUTPUT]
    kind: object = tensor.get("datatype")
    shape: Any = tensor.get("shape")
    sound = isinstance(shape, list) and len(shape) == 4 and all(isinstance(one, int) and one > 0 for one in shape)
    if kind != "UINT8" or not sound or shape[0] != n or shape[3] != 3:
        raise ArtefactError(f"{place} gave {OUTPUT} as {kind} {shape}, not as UINT8 [{n}, height, width, 3]")
    try:
        values = np.array(tensor.get("data"))
        if values.dtype.kind not in "iu" or values.size != np.prod(shape) or values.min() < 0 or values.max() > 255:
            raise ValueError("other values")
    except ValueError as error:
        raise ArtefactError(f"{place} gave {OUTPUT} with data that are no UINT8 values of shape {shape}") from error
    return values.astype(np.uint8).reshape(shape)
