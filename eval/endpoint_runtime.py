"""What runtimes behind an endpoint share: requests in groups, several under way at a time, images of one size."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from threading import Lock

import numpy as np
import numpy.typing as npt

from excise.errors import ArtefactError, UsageError
from excise.eval.endpoint_http import Endpoint, Session
from excise.serve.denoising import check_requests
from excise.serve.runtime import Progress, Request, requested_size

Images = npt.NDArray[np.uint8]

#: The size of a server's images before it made one.
_UNKNOWN = (0, 0)


class EndpointRuntime(ABC):
    """Images of a server.

    Args:
        endpoint: where it is.
        name: as in reports.
        batch_size: requests that are sent together.
        concurrency: how many such batches are under way at a time.
        image_size: (height, width) of its images where a request names no size; None takes the first one's.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        *,
        name: str,
        batch_size: int = 1,
        concurrency: int = 1,
        image_size: tuple[int, int] | None = None,
    ) -> None:
        self.endpoint, self.name = endpoint, name
        self.batch_size, self.concurrency, self.image_size = batch_size, concurrency, image_size

    def generate(
        self,
        requests: Sequence[Request],
        *,
        num_inference_steps: int = 50,
        guidance_scale: float = 7.5,
        progress: Progress | None = None,
    ) -> Images:
        """Images as uint8 with shape (n, height, width, 3), in the order of the requests; ``progress`` counts images.

        Raises:
            UsageError: a request that can't be sent, that the server refuses, or no server there; several sizes.
            ArtefactError: the server fails, or answers with something else than images of the size that is asked for,
                or of the first one's.
        """
        check_requests(requests, guidance_scale)
        if any(request.index or request.edit is not None for request in requests):
            raise UsageError("an endpoint takes a prompt and a seed: neither an index nor an edit can be asked for")
        expected = requested_size(requests, self.image_size or _UNKNOWN, 1)
        groups = [requests[start : start + self.batch_size] for start in range(0, len(requests), self.batch_size)]
        done, counting = 0, Lock()
        with self.endpoint.session() as session, ThreadPoolExecutor(self.concurrency) as pool:

            def ask(group: Sequence[Request]) -> list[Images]:
                nonlocal done
                images = self._ask(session, group, num_inference_steps, guidance_scale)
                with counting:
                    done += len(group)
                    if progress is not None:
                        progress(done, len(requests))
                return images

            images = [image for group in pool.map(ask, groups) for image in group]
        if expected == _UNKNOWN and images:
            self.image_size = expected = images[0].shape[0], images[0].shape[1]
        for image in images:
            height, width = image.shape[:2]
            if (height, width) != expected:
                raise ArtefactError(
                    f"{self.endpoint.url} gave an image of {width} × {height} pixels where {expected[1]} × "
                    f"{expected[0]} was expected: a server makes the size that it is asked for, and else keeps to one"
                )
        return np.stack(images) if images else np.empty((0, *expected, 3), np.uint8)

    @abstractmethod
    def _ask(
        self, session: Session, requests: Sequence[Request], num_inference_steps: int, guidance_scale: float
    ) -> list[Images]:
        """One image (height, width, 3) for each of at most ``batch_size`` requests. Called from several threads."""
