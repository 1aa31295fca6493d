"""Runtimes without PyTorch, and what they share.

``OnnxRuntime`` is in ``excise.serve.onnx_runtime``: it needs onnxruntime, which nothing else here does.
"""

from excise.serve.runtime import Progress, Request, Runtime, initial_latents
from excise.serve.schedulers import SCHEDULERS, Sampler, Scheduler, read_scheduler, scheduler_from_config
from excise.serve.tokenizer import PromptTokenizer

__all__ = [
    "SCHEDULERS",
    "Progress",
    "PromptTokenizer",
    "Request",
    "Runtime",
    "Sampler",
    "Scheduler",
    "initial_latents",
    "read_scheduler",
    "scheduler_from_config",
]
