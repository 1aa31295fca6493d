"""An endpoint with OpenAI's image API as a runtime: ``POST {URL}/v1/images/generations``.

Sent for each image: ``prompt``, ``n`` = 1, ``response_format`` = ``b64_json``, ``model`` and ``size`` where they were
named, and the extensions ``seed``, ``num_inference_steps``, ``guidance_scale`` and ``negative_prompt``, without which
nothing could be compared. Read: ``data[0].b64_json``, a PNG, WebP or JPEG image (of which JPEG loses detail).
Source: OpenAI's API reference, "Create image"; the extensions are those of servers of open models.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import count

import numpy as np
import numpy.typing as npt
from PIL import Image

from excise.errors import ArtefactError, UsageError
from excise.eval.endpoint_http import Endpoint, Session
from excise.serve.denoising import check_requests
from excise.serve.runtime import Progress, Request

PATH = "/v1/images/generations"
_READ = ("PNG", "WEBP", "JPEG")


class OpenAIRuntime:
    """Images of a server, one a request.

    Args:
        endpoint: where; ``PATH`` is appended to its address.
        name: as in reports.
        model: the server's name for what it is to run; None leaves it to the server.
        size: ``WIDTHxHEIGHT``; None leaves it to the server.
        concurrency: how many requests are under way at a time.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        *,
        name: str,
        model: str | None = None,
        size: str | None = None,
        concurrency: int = 1,
    ) -> None:
        self.name, self.endpoint, self.concurrency = name, endpoint, concurrency
        self._named = {key: value for key, value in (("model", model), ("size", size)) if value is not None}
        #: (height, width) of its images: the named size, or the first image's.
        self.image_size: tuple[int, int] | None = None
        if size is not None:
            width, _, height = size.partition("x")
            self.image_size = (int(height), int(width))

    def generate(
        self,
        requests: Sequence[Request],
        *,
        num_inference_steps: int = 50,
        guidance_scale: float = 7.5,
        progress: Progress | None = None,
    ) -> npt.NDArray[np.uint8]:
        """Images as uint8 with shape (n, height, width, 3), in the order of the requests; ``progress`` counts images.

        Raises:
            UsageError: a request that can't be sent, or that the server refuses.
            ArtefactError: the server fails, or answers with something else than one image of the first one's size.
        """
        check_sendable(requests, guidance_scale)

        def ask(session: Session, request: Request) -> npt.NDArray[np.uint8]:
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
                },
            )
            return _image(answer, self.endpoint.url)

        images = in_parallel(self.endpoint, ask, requests, self.concurrency, progress)
        self.image_size = one_size(images, self.image_size, self.endpoint.url)
        return np.concatenate([np.empty((0, *self.image_size, 3), np.uint8), *(image[None] for image in images)])


def in_parallel[Asked, Answer](
    endpoint: Endpoint,
    ask: Callable[[Session, Asked], Answer],
    asked: Sequence[Asked],
    concurrency: int,
    progress: Progress | None,
) -> list[Answer]:
    """The answers in the order of ``asked``, ``concurrency`` at a time. The first failure ends all that hasn't begun."""
    done = count(1)
    with endpoint.session() as session, ThreadPoolExecutor(concurrency) as pool:

        def one(each: Asked) -> Answer:
            answer = ask(session, each)
            if progress is not None:
                progress(next(done), len(asked))
            return answer

        return list(pool.map(one, asked))


def check_sendable(requests: Sequence[Request], guidance_scale: float) -> None:
    """Raise ``UsageError`` for a seed or scale that can't be used, or what these interfaces have no field for."""
    check_requests(requests, guidance_scale)
    for request in requests:
        if request.index or request.edit is not None:
            raise UsageError("an endpoint takes a prompt and a seed: neither an index nor an edit can be asked for")


def one_size(
    images: Sequence[npt.NDArray[np.uint8]], expected: tuple[int, int] | None, url: str
) -> tuple[int, int]:
    """The (height, width) of all ``images``, which must be ``expected`` where that is known.

    Raises:
        ArtefactError: one has another size than the first.
    """
    for image in images:
        expected = expected or (image.shape[0], image.shape[1])
        if image.shape[:2] != expected:
            height, width = expected
            raise ArtefactError(
                f"{url} gave an image of {image.shape[1]} × {image.shape[0]} pixels where {width} × {height} was "
                "expected: name one size that it keeps to"
            )
    return expected or (0, 0)


def _image(answer: dict[str, object], url: str) -> npt.NDArray[np.uint8]:
    """The one image of an answer, uint8 with shape (height, width, 3)."""
    data = answer.get("data")
    first = data[0] if isinstance(data, list) and len(data) == 1 and isinstance(data[0], dict) else {}
    encoded = first.get("b64_json")
    if not isinstance(encoded, str):
        what = "an image's address" if first.get("url") else f"{', '.join(sorted(answer)) or 'nothing'}"
        raise ArtefactError(f"{url}{PATH} answered {what}, where data[0].b64_json was expected: does it support that?")
    try:
        with Image.open(io.BytesIO(base64.b64decode(encoded, validate=True)), formats=_READ) as opened:
            return np.asarray(opened.convert("RGB"))
    except Exception as error:  # Pillow's decoders share no base class of errors
        raise ArtefactError(f"{url}{PATH} gave a b64_json that is no whole PNG, WebP or JPEG image: {error}") from error
