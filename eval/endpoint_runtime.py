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
from excise.serve.runtime import Progress, Request

Images = npt.NDArray[np.uint8]


class EndpointRuntime(ABC):
    """Images of a server.

    Args:
        endpoint: where it is.
        name: as in reports.
        batch_size: requests that are sent together.
        concurrency: how many such batches are under way at a time.
        image_size: (height, width) that its images have; None takes the first one's.
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
            UsageError: a request that can't be sent, that the server refuses, or no server there.
            ArtefactError: the server fails, or answers with something else than images of the first one's size.
        """
        check_requests(requests, guidance_scale)
        if any(request.index or request.edit is not None for request in requests):
            raise UsageError("an endpoint takes a prompt and a seed: neither an index nor an edit can be asked for")
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
        for image in images:
            self._check_size(image.shape[0], image.shape[1])
        return np.stack(images) if images else np.empty((0, *(self.image_size or (0, 0)), 3), np.uint8)

    @abstractmethod
    def _ask(
        self, session: Session, requests: Sequence[Request], num_inference_steps: int, guidance_scale: float
    ) -> list[Images]:
        """One image (height, width, 3) for each of at most ``batch_size`` requests. Called from several threads."""

    def _check_size(self, height: int, width: int) -> None:
        """Raise ``ArtefactError`` unless an image has the size of those before it."""
        self.image_size = self.image_size or (height, width)
        if (height, width) != self.image_size:
            raise ArtefactError(
                f"{self.endpoint.url} gave an image of {width} × {height} pixels where {self.image_size[1]} × "
                f"{self.image_size[0]} was expected: all images of a run have one size"
            )
