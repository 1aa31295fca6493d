"""The metrics of a model inside Triton: one family a name, one value for each reason of a failure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from types import SimpleNamespace
from typing import Any

from excise.serve.engine import Failures
from excise.serve.triton_metrics import FAMILIES, IMAGES_FAILED, INFO, REASONS, Metrics

LABELS = {"model": "excise", "version": "1", "instance": "0"}


class Backend:
    """``pb_utils``, of which each family may be made once, as Triton's registry has it."""

    def __init__(self) -> None:
        self.values: dict[tuple[str, str], float] = {}
        self.labels: dict[tuple[str, str], dict[str, str]] = {}
        backend, made = self, set[str]()

        class MetricFamily:
            COUNTER, GAUGE = 0, 1

            def __init__(self, *, name: str, description: str, kind: int) -> None:
                assert name not in made
                made.add(name)
                self._name = name

            def Metric(self, *, labels: Mapping[str, str]) -> Any:
                place = self._name, labels.get("reason", "")
                assert place not in backend.values, "each set of labels is one value"
                backend.values[place], backend.labels[place] = 0.0, dict(labels)

                def increment(by: float) -> None:
                    backend.values[place] += by

                return SimpleNamespace(increment=increment, set=lambda to: backend.values.__setitem__(place, to))

        self.MetricFamily = MetricFamily


def test_images_failed_are_counted_by_reason() -> None:
    backend = Backend()
    metrics = Metrics(backend, LABELS, {"edit_id": "e", "manifest_sha256": "m"})
    for outcome, images in (("failed", 2), ("cancelled", 3), ("images", 50), ("", 60), ("failed", 1)):
        metrics.images_failed(outcome, images)
    found = {reason: value for (name, reason), value in backend.values.items() if name == IMAGES_FAILED[0]}
    assert found == {"model_error": 3, "cancelled": 3}
    assert backend.labels[IMAGES_FAILED[0], "model_error"] == {**LABELS, "reason": "model_error"}
    assert {name for name, _ in backend.values} == {name for name, _, _ in (*FAMILIES, INFO, IMAGES_FAILED)}
    metrics.close()
    metrics.images_failed("failed", 1)
    assert backend.values[IMAGES_FAILED[0], "model_error"] == 3


def test_the_reasons_are_the_embedded_servers() -> None:
    """So that one alert reads both."""
    assert set(REASONS.values()) <= {field.name for field in fields(Failures)}
