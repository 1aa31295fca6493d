"""Evaluation: protocols, detectors, metrics, statistics, verdicts and reports.

What needs no PyTorch is named here; the rest is imported from its file: ``torch_runtime.TorchRuntime``,
``detector.ClipDetector``, ``judge.judge``, ``report.write_report``.
"""

from excise.eval.protocol import PromptSeeds, Protocol, demo_weapons
from excise.eval.results import BASE, EDITED_ONNX, EDITED_TORCH, ROLES, Results, RuntimeResults
from excise.eval.verdict import Check, Thresholds, Verdict, decide

__all__ = [
    "BASE",
    "EDITED_ONNX",
    "EDITED_TORCH",
    "ROLES",
    "Check",
    "PromptSeeds",
    "Protocol",
    "Results",
    "RuntimeResults",
    "Thresholds",
    "Verdict",
    "decide",
    "demo_weapons",
]
