"""What an image costs: the torch-free loop on ONNX Runtime beside diffusers' own pipeline on PyTorch, in one run.

    python bench/denoising.py MODEL ONNX_DIR [--device cpu|cuda] [--dtype fp32|fp16] [--steps N] [--images N]
                              [--repeat N] [--json]

MODEL is a diffusers folder and ONNX_DIR its export in the same ``--dtype``. Both make the same images, prompts and
latents; the order alternates, and the figure is the median. PyTorch runs as diffusers sets it up (attention by
``scaled_dot_product_attention``), without compilation; TF32 is off on both sides. A run without steps would be text
encoder and VAE: ``ms_per_step`` is the difference between ``--steps`` and half of them.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch

from excise.eval.torch_runtime import TorchRuntime
from excise.export.pipeline import load_pipeline
from excise.serve.onnx_runtime import OnnxRuntime
from excise.serve.runtime import Request

DTYPES = {"fp32": torch.float32, "fp16": torch.float16}


def seconds(runtime: Any, requests: list[Request], steps: int, device: str) -> tuple[float, Any]:
    """Of one call, and its images; what PyTorch left to do on the GPU is waited for before and after."""
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    images = runtime.generate(requests, num_inference_steps=steps)
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start, images


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """The document that is printed."""
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    requests = [Request("a photo of a cat", seed=number) for number in range(arguments.images)]
    loads, runtimes = {}, {}
    for name in ("torch", "onnx"):
        say(f"loading {name}")
        start = time.perf_counter()
        if name == "torch":
            pipeline = load_pipeline(arguments.model).to(arguments.device, DTYPES[arguments.dtype])
            pipeline.vae.to(torch.float32)  # as the export has it
            runtimes[name] = TorchRuntime(pipeline, name=name, batch_size=arguments.images)
        else:
            runtimes[name] = OnnxRuntime(
                arguments.onnx_dir, provider=arguments.device, batch_size=arguments.images, name=name
            )
        loads[name] = time.perf_counter() - start
    steps = {"whole": arguments.steps, "half": arguments.steps // 2}
    times: dict[str, list[float]] = {f"{name} {length}": [] for name in runtimes for length in steps}
    images = {}
    for name, runtime in runtimes.items():
        images[name] = seconds(runtime, requests, steps["half"], arguments.device)[1]
    for number in range(arguments.repeat):
        say(f"run {number + 1} of {arguments.repeat}")
        order = list(runtimes)[:: 1 if number % 2 == 0 else -1]
        for length, count in steps.items():
            for name in order:
                taken, _ = seconds(runtimes[name], requests, count, arguments.device)
                times[f"{name} {length}"].append(taken)
    median = {name: statistics.median(values) for name, values in times.items()}
    more = steps["whole"] - steps["half"]
    return {
        "device": torch.cuda.get_device_name() if arguments.device == "cuda" else "cpu",
        "dtype": arguments.dtype,
        "steps": arguments.steps,
        "images": arguments.images,
        "load_seconds": loads,
        "seconds_per_image": {name: median[f"{name} whole"] / arguments.images for name in runtimes},
        "ms_per_step": {name: 1000 * (median[f"{name} whole"] - median[f"{name} half"]) / more for name in runtimes},
        "torch_over_onnx": median["torch whole"] / median["onnx whole"],
        "mean_difference_grey_levels": float(np.abs(images["torch"].astype(int) - images["onnx"]).mean()),
        "torch": torch.__version__,
        "onnxruntime": onnxruntime.__version__,
        "times": times,
    }


def say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("onnx_dir", type=Path)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="fp32")
    parser.add_argument("--steps", type=int, default=20, metavar="N", help="denoising steps (20)")
    parser.add_argument("--images", type=int, default=1, metavar="N", help="in one batch (1)")
    parser.add_argument("--repeat", type=int, default=3, metavar="N", help="pairs (3)")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    arguments = parser.parse_args()
    if min(arguments.steps // 2, arguments.images, arguments.repeat) < 1:
        parser.error("--steps takes 2 or more, --images and --repeat 1 or more")
    document = measure(arguments)
    if arguments.json:
        print(json.dumps(document, indent=2))
        return
    print(f"{document['device']}, {document['dtype']}, {document['steps']} steps, {document['images']} images a batch")
    for name in ("torch", "onnx"):
        print(
            f"{name}: {document['seconds_per_image'][name]:.3f} s an image, {document['ms_per_step'][name]:.2f} ms a "
            f"step, loaded in {document['load_seconds'][name]:.1f} s"
        )
    print(f"torch / onnx {document['torch_over_onnx']:.2f}; images {document['mean_difference_grey_levels']:.3f} apart")


if __name__ == "__main__":
    main()
