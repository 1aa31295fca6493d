"""The answers to one Triton request: one response, or of a decoupled model several, the last of them marked."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from excise.errors import ExciseError, NotServed, UsageError


class Reply:
    """Where the answers to a request go. Of a model that isn't decoupled, ``response`` is what ``execute`` returns."""

    def __init__(self, request: Any, pb_utils: Any, *, decoupled: bool) -> None:
        self._request, self._pb_utils = request, pb_utils
        self._sender = request.get_response_sender() if decoupled else None
        self.response: Any = None
        #: what came of it: "images", "failed" or "cancelled"; empty until then
        self.outcome = ""

    @property
    def streams(self) -> bool:
        """Whether it can take a preview."""
        return self._sender is not None

    @property
    def open(self) -> bool:
        """Whether the last answer is still to come."""
        return self.response is None

    @property
    def cancelled(self) -> bool:
        """Whether nobody waits for it any more."""
        return bool((self._sender or self._request).is_cancelled())

    def preview(self, name: str, values: npt.NDArray[Any], step: int) -> None:
        """Send what there is after ``step`` steps, of each of the request's images."""
        self._send(self._tensors(name, values, step))

    def images(self, images: npt.NDArray[np.uint8], step: int) -> None:
        """Answer with the images, uint8 with shape (n, h, w, 3)."""
        self._send(self._tensors("IMAGES", images, step), outcome="images")

    def fail(self, error: Exception) -> None:
        """Answer with an error: INVALID_ARG, UNAVAILABLE or INTERNAL, by its class."""
        codes = self._pb_utils.TritonError
        if isinstance(error, UsageError):
            code = codes.INVALID_ARG
        else:
            code = codes.UNAVAILABLE if isinstance(error, NotServed) else codes.INTERNAL
        # another library's message may hold paths, or a prompt
        text = str(error) if isinstance(error, ExciseError) else f"internal error ({type(error).__name__}): see the log"
        self._send(None, outcome="failed", error=self._pb_utils.TritonError(text, code))

    def cancel(self) -> None:
        """Answer that it was cancelled."""
        error = self._pb_utils.TritonError("cancelled by the client", self._pb_utils.TritonError.CANCELLED)
        self._send(None, outcome="cancelled", error=error)

    def _tensors(self, name: str, values: npt.NDArray[Any], step: int) -> list[Any]:
        tensors = [self._pb_utils.Tensor(name, np.ascontiguousarray(values))]
        if self.streams:
            tensors.append(self._pb_utils.Tensor("STEP", np.full((len(values), 1), step, np.int32)))
        return tensors

    def _send(self, tensors: list[Any] | None, *, outcome: str = "", error: Any = None) -> None:
        """Send one answer, the last one where it has an outcome."""
        if not self.open:
            return
        response = self._pb_utils.InferenceResponse(output_tensors=tensors or [], error=error)
        if outcome:
            self.response, self.outcome = response, outcome
        if self._sender is not None:
            self._sender.send(response, flags=self._pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL if outcome else 0)
