"""Requests of one ``execute`` that are denoised together, from which cancelled and failing ones drop out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from excise.errors import ArtefactError, ExciseError
from excise.serve.denoising import Denoising
from excise.serve.onnx_runtime import OnnxRuntime
from excise.serve.triton_reply import Reply
from excise.serve.triton_request import Asked


@dataclass(frozen=True)
class Member:
    """One request of a batch: what it asks for, and where the answer goes."""

    asked: Asked
    reply: Reply


class Batch:
    """Requests with the same number of steps.

    ``preview_every`` N sends what there is after every N steps to those that stream, as ``preview`` ("images" or
    "latents"); 0 sends none. ``on_step`` is told how many images each call of the UNet was for.
    """

    def __init__(
        self,
        runtime: OnnxRuntime,
        members: Sequence[Member],
        *,
        preview_every: int = 0,
        preview: str = "images",
        on_step: Callable[[int], object] | None = None,
    ) -> None:
        self._runtime, self._members = runtime, members
        self._preview_every, self._preview, self._on_step = preview_every, preview, on_step
        #: of each image, the place of its request
        self._owner = np.repeat(np.arange(len(members)), [len(member.asked.requests) for member in members])

    def run(self) -> None:
        """Denoise, decode and answer all.

        Raises what isn't an error of excise's, once all are answered.
        """
        try:
            denoising = self._runtime.start(
                [request for member in self._members for request in member.asked.requests],
                num_inference_steps=self._members[0].asked.num_inference_steps,
                guidance_scale=[scale for member in self._members for scale in member.asked.guidance_scales],
            )
            while denoising.done < denoising.total:
                if not self._drop_cancelled(denoising):
                    return
                denoising.step()
                if self._on_step is not None:
                    self._on_step(len(denoising.rows))
                last = denoising.done == denoising.total
                if self._preview_every and not last and denoising.done % self._preview_every == 0:
                    self._send_previews(denoising)
            self._answer(denoising)
        except Exception as error:
            for member in self._members:
                if member.reply.open:
                    member.reply.fail(error)
            if not isinstance(error, ExciseError):
                raise

    def _drop_cancelled(self, denoising: Denoising) -> bool:
        """Answer those that were cancelled and go on without them; False where nobody is left."""
        held = self._owner[denoising.rows]
        gone = [place for place in np.unique(held) if self._members[place].reply.cancelled]
        for place in gone:
            self._members[place].reply.cancel()
        staying = np.flatnonzero(~np.isin(held, gone))
        if gone and len(staying):
            denoising.keep(staying.tolist())
        return bool(len(staying))

    def _send_previews(self, denoising: Denoising) -> None:
        """To those that stream; what can't be decoded yet is no error."""
        held = self._owner[denoising.rows]
        for place in np.unique(held):
            reply, latents = self._members[place].reply, denoising.latents[held == place]
            if not reply.streams or not np.isfinite(latents).all():
                continue
            if self._preview == "latents":
                reply.preview("LATENTS", latents, denoising.done)
            else:
                reply.preview("IMAGES", self._runtime.decode(latents), denoising.done)

    def _answer(self, denoising: Denoising) -> None:
        """Decode and send. Where the latents of one request aren't finite, its neighbours still get their images."""
        held = self._owner[denoising.rows]
        finite = np.asarray(np.isfinite(denoising.latents).all(axis=(1, 2, 3)))
        images = self._runtime.decode(denoising.latents[finite]) if finite.any() else None
        for place in np.unique(held):
            mine = held == place
            reply = self._members[place].reply
            if images is None or not finite[mine].all():
                reply.fail(
                    ArtefactError("the latents aren't finite: take another guidance scale, or check the unet's dtype")
                )
                continue
            reply.images(images[mine[finite]], denoising.done)
