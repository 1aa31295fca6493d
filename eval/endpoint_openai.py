"""An endpoint with OpenAI's image API as a runtime: ``POST {URL}/v1/images/generations``.

Sent for each image: ``prompt``, ``n`` = 1, ``response_format`` = ``b64_json``, ``model`` where it was named, ``size``
where the request names one or the runtime does, and the extensions ``seed``, ``num_inference_steps``,
``guidance_scale`` and ``negative_prompt``, without which nothing could be compared. Read: ``data[0].b64_json``, a PNG,
WebP or JPEG image (of which JPEG loses detail). ``GET {URL}/v1/models`` is asked once for the edit and the manifest
that excise's own server tells there; others tell neither.
Source: OpenAI's API reference, "Create image"; the extensions are those of servers of open models.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from PIL import Image

from excise.errors import ArtefactError, UsageError
from excise.eval.endpoint_http import Endpoint, Session
from excise.eval.endpoint_runtime import EndpointRuntime, Images
from excise.serve.runtime import Request

PATH, MODELS = "/v1/images/generations", "/v1/models"
#: Seconds that a list of models may take.
LONGEST_ANSWER = 10.0
_READ = ("PNG", "WEBP", "JPEG")


class OpenAIRuntime(EndpointRuntime):
    """Images of a server, one a request.

    Args:
        endpoint: where; ``PATH`` is appended to its address.
        name: as in reports.
        model: the server's name for what it is to run; None leaves it to the server.
        size: (width, height) of images whose request names none; None leaves it to the server.
        concurrency: how many requests are under way at a time.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        *,
        name: str,
        model: str | None = None,
        size: tuple[int, int] | None = None,
        concurrency: int = 1,
    ) -> None:
        super().__init__(endpoint, name=name, concurrency=concurrency, image_size=size and (size[1], size[0]))
        self._named = {} if model is None else {"model": model}
        self._named |= {} if size is None else {"size": f"{size[0]}x{size[1]}"}

    def _ask(
        self, session: Session, requests: Sequence[Request], num_inference_steps: int, guidance_scale: float
    ) -> list[Images]:
        (request,) = requests
        sized = request.width is not None and request.height is not None
        answer = session.post(
            PATH,
            {
                "prompt": request.prompt,
                "n": 1,
                "response_format": "b64_json",
                "seed": request.seed,
                "num_inference_steps": num_inference_steps,
                "guidance_scale": guidance_scale,
                "negative_prompt": request.negative_prompt,
                **self._named,
                **({"size": f"{request.width}x{request.height}"} if sized else {}),
            },
        )
        return [_image(answer, self.endpoint.url)]


def served_edit(endpoint: Endpoint, model: str | None) -> tuple[str | None, str | None]:
    """The ids of the edit and of the manifest that a server names beside its model; None where it names none.

    It is asked once: servers of this API needn't have a list, and a run whose images are all there needs no server.

    Args:
        model: the server's name for it; None is the first one that it lists.
    """
    once = replace(endpoint, retries=0, timeout=min(endpoint.timeout, LONGEST_ANSWER))
    try:
        with once.session() as session:
            listed = (session.get(MODELS) or {}).get("data")
    except (UsageError, ArtefactError):
        return None, None
    entries = [one for one in listed if isinstance(one, dict)] if isinstance(listed, list) else []
    entry = next((one for one in entries if model is None or one.get("id") == model), {})
    edit, manifest = entry.get("edit"), entry.get("manifest")
    identity = edit.get("edit_id") if isinstance(edit, dict) else None
    return identity if isinstance(identity, str) else None, manifest if isinstance(manifest, str) else None


def _image(answer: dict[str, object], url: str) -> Images:
    """The one image of an answer, uint8 with shape (height, width, 3)."""
    data = answer.get("data")
    first = data[0] if isinstance(data, list) and len(data) == 1 and isinstance(data[0], dict) else {}
    encoded = first.get("b64_json")
    if not isinstance(encoded, str):
        what = "an image's address" if first.get("url") else ", ".join(sorted(answer)) or "an empty object"
        raise ArtefactError(f"{url}{PATH} answered {what}, where one data[0].b64_json was expected")
    try:
        with Image.open(io.BytesIO(base64.b64decode(encoded, validate=True)), formats=_READ) as opened:
            return np.asarray(opened.convert("RGB"))
    except Exception as error:  # Pillow's decoders share no base class of errors
        raise ArtefactError(f"{url}{PATH} gave a b64_json that is no whole PNG, WebP or JPEG image") from error
