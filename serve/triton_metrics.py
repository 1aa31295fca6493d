"""The metrics of a model that runs inside Triton, beside Triton's own on its ``/metrics``.

Every one has the labels ``model``, ``version`` and ``instance``.
"""

from __future__ import annotations

from typing import Any

from excise.serve.canary import CanaryResult

#: name, kind, what it says
FAMILIES: tuple[tuple[str, str, str], ...] = (
    ("excise_canary_ok", "GAUGE", "1 if the last run of the canary passed, 0 if it failed"),
    ("excise_canary_runs_total", "COUNTER", "Runs of the canary"),
    ("excise_canary_failures_total", "COUNTER", "Runs of the canary that failed"),
    ("excise_canary_max_latent_difference", "GAUGE", "Largest relative difference from the recorded latents, last run"),
    ("excise_canary_seconds", "GAUGE", "Duration of the last run of the canary in seconds"),
    ("excise_images_total", "COUNTER", "Images that were sent"),
    ("excise_unet_steps_total", "COUNTER", "Denoising steps, one for each call of the UNet whatever the batch"),
    ("excise_image_steps_total", "COUNTER", "Denoising steps summed over images: divided by the former, a mean batch"),
    ("excise_cancelled_total", "COUNTER", "Requests that were cancelled"),
    ("excise_failed_total", "COUNTER", "Requests that were answered with an error"),
)
#: The embedded server's metric of this name, with the label ``reason``: of requests that were read, so that a mistake
#: of a client's isn't one of the model's. Requests that wait too long are Triton's own, and in its metrics.
IMAGES_FAILED = ("excise_images_failed_total", "COUNTER", "Images that were begun and not made")
#: A reply's outcome → the reason.
REASONS = {"failed": "model_error", "cancelled": "cancelled"}
INFO = ("excise_edit_info", "GAUGE", "1; the labels edit_id and manifest_sha256 say what is served")


class Metrics:
    """The values, by the names in ``FAMILIES``. ``labels`` are of all of them, ``info`` those of ``INFO`` besides."""

    def __init__(self, pb_utils: Any, labels: dict[str, str], info: dict[str, str]) -> None:
        self._families, self._values = [], {}
        for name, kind, description in (*FAMILIES, INFO):
            family = pb_utils.MetricFamily(
                name=name, description=description, kind=getattr(pb_utils.MetricFamily, kind)
            )
            self._families.append(family)
            self._values[name] = family.Metric(labels={**labels, **(info if name == INFO[0] else {})})
        self._values[INFO[0]].set(1)
        name, kind, description = IMAGES_FAILED
        family = pb_utils.MetricFamily(name=name, description=description, kind=getattr(pb_utils.MetricFamily, kind))
        self._families.append(family)
        self._failed = {
            outcome: family.Metric(labels={**labels, "reason": reason}) for outcome, reason in REASONS.items()
        }

    def add(self, name: str, amount: float = 1) -> None:
        """Count."""
        if amount:
            self._values[name].increment(amount)

    def images_failed(self, outcome: str, images: int) -> None:
        """Count images by their reply's outcome; one that is none of ``REASONS`` is no failure."""
        if outcome in self._failed:
            self._failed[outcome].increment(images)

    def canary(self, result: CanaryResult) -> None:
        """Note what a canary found. A difference that couldn't be taken is shown as infinite."""
        self.add("excise_canary_runs_total")
        self.add("excise_canary_failures_total", 0 if result.passed else 1)
        self._values["excise_canary_ok"].set(1 if result.passed else 0)
        difference = float("inf") if result.difference is None else result.difference
        self._values["excise_canary_max_latent_difference"].set(difference)
        self._values["excise_canary_seconds"].set(result.seconds)

    def close(self) -> None:
        """Forget them, so that Triton stops to show a version that isn't served any more."""
        self._values.clear()
        self._failed.clear()
        self._families.clear()
