"""A runtime behind an output filter: how much of what an edit leaves a filter would catch, and what it takes away."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from excise.serve.output_filter import Hiding, OutputFilter, hidden
from excise.serve.runtime import Progress, Request, Runtime


class FilteredRuntime:
    """The images of ``runtime``, those that ``output_filter`` flags blurred or blank.

    ``flagged`` counts them since the start, of ``seen`` images.
    """

    def __init__(
        self, runtime: Runtime, output_filter: OutputFilter, *, hiding: Hiding = "blank", name: str | None = None
    ) -> None:
        self._runtime, self._filter, self._hiding = runtime, output_filter, hiding
        self.name = name or f"{runtime.name} + {output_filter.name}"
        self.seen = self.flagged = 0

    def generate(
        self,
        requests: Sequence[Request],
        *,
        num_inference_steps: int = 50,
        guidance_scale: float = 7.5,
        progress: Progress | None = None,
    ) -> npt.NDArray[np.uint8]:
        """Images as uint8 with shape (n, height, width, 3), in the order of the requests.

        Raises what the runtime and the filter raise.
        """
        images = self._runtime.generate(
            requests, num_inference_steps=num_inference_steps, guidance_scale=guidance_scale, progress=progress
        )
        verdicts = self._filter.verdicts(list(images))
        self.seen += len(verdicts)
        self.flagged += sum(verdict.flagged for verdict in verdicts)
        shown = [
            hidden(image, self._hiding) if verdict.flagged else image
            for image, verdict in zip(images, verdicts, strict=True)
        ]
        return np.stack(shown) if shown else images
