"""Artefacts of the right edit, each run in another way: a gate must let all of them pass."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from unittest import mock

import onnxruntime

from excise.demo import MODEL
from excise.eval.torch_runtime import TorchRuntime
from excise.export.pipeline import load_pipeline
from excise.serve.onnx_runtime import OnnxRuntime
from excise.serve.runtime import Runtime
from tests.eval.artefact_workshop import Workshop


def two_threads(workshop: Workshop) -> Runtime:
    """Two threads in every operator, and batches of 8."""
    return workshop.open(threads=2)


def unfused(workshop: Workshop) -> Runtime:
    """No graph optimisation at all: every node of the export runs by itself."""
    return _optimised(workshop, onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL)


def fused_basically(workshop: Workshop) -> Runtime:
    """Basic graph optimisation only, and three images at a time."""
    return _optimised(workshop, onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC, batch_size=3)


def edited_at_load(workshop: Workshop) -> Runtime:
    """The unedited folder, with the edit given when it is opened."""
    return workshop.open(workshop.rewritten(workshop.weights(None)), edit=workshop.edit, batch_size=5)


def torch_in_other_batches(workshop: Workshop) -> Runtime:
    """PyTorch, five images at a time."""
    return TorchRuntime(load_pipeline(MODEL, workshop.edit), name="torch", batch_size=5)


def _optimised(workshop: Workshop, level: onnxruntime.GraphOptimizationLevel, **options: int) -> OnnxRuntime:
    made = onnxruntime.SessionOptions

    def options_at_level() -> onnxruntime.SessionOptions:
        chosen = made()
        chosen.graph_optimization_level = level
        return chosen

    with mock.patch.object(onnxruntime, "SessionOptions", options_at_level):
        return workshop.open(**options)


RIGHT: Mapping[str, Callable[[Workshop], Runtime]] = MappingProxyType(
    {
        "two threads": two_threads,
        "no graph optimisation": unfused,
        "basic graph optimisation, batches of 3": fused_basically,
        "edit given at load": edited_at_load,
        "torch, batches of 5": torch_in_other_batches,
    }
)
