"""What a bank of edits costs per step of the UNet: paired runs with and without it, on ONNX Runtime.

    python bench/bank.py [--size demo|sd14] [--edits N] [--requests N ...] [--repeat N] [--threads N] [--json]
                         [--provider cpu|cuda] [--dtype fp32|fp16]

*demo*  the bundled model, exported once to a temporary folder.
*sd14*  a UNet in Stable Diffusion 1.4's shapes with random weights, exported once likewise (3.4 GB).

The edits are random matrices of full rank near the identity; the product costs the same for any. A run with guidance
has two rows of the batch for each request, and the rows' edits differ. In each pair the order alternates, so that a
slow moment of the machine hits both alike; the figure is the median of the differences, with its quartiles. The same
plain model is run again in each pair: how far from zero its difference lies is noise.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import json
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from excise.editfile import Edit, fingerprint
from excise.editmetadata import EditMetadata, Kept, Stream
from excise.export.bank import add_bank
from excise.export.onnx_graph import Graph
from excise.serve.onnx_component import DTYPES
from excise.serve.provider_options import provider_options

SD14 = {
    "sample_size": 64,
    "block_out_channels": (320, 640, 1280, 1280),
    "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
    "layers_per_block": 2,
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
}
#: Latent channels, latent side, tokens, width.
SHAPES = {"demo": (16, 8, 24, 256), "sd14": (4, 64, 77, 768)}


def export_unet(size: str, folder: Path, dtype: str, device: str) -> Path:
    """``model.onnx`` of a UNet alone, with external data, traced on a device."""
    import torch
    from diffusers import UNet2DConditionModel

    if size == "demo":
        from excise.demo import MODEL

        unet = UNet2DConditionModel.from_pretrained(MODEL / "unet")
    else:
        torch.manual_seed(0)
        unet = UNet2DConditionModel(**SD14)
    channels, side, tokens, width = SHAPES[size]
    place: dict[str, Any] = {"device": device, "dtype": {"fp32": torch.float32, "fp16": torch.float16}[dtype]}
    unet.to(**place)
    inputs = (
        torch.zeros(2, channels, side, side, **place),
        torch.tensor(401.0, **place),
        torch.zeros(2, tokens, width, **place),
    )
    names = ("sample", "timestep", "encoder_hidden_states")
    path = folder / "model.onnx"
    with warnings.catch_warnings(), contextlib.redirect_stdout(sys.stderr):
        warnings.simplefilter("ignore")  # the tracer's, by the dozen
        torch.onnx.export(
            unet.eval(),
            inputs,
            str(path),  # of a Path it writes no external data, and 2 GiB are the most
            input_names=list(names),
            output_names=["out_sample"],
            dynamic_axes={name: {0: "batch_size"} for name in ("sample", "encoder_hidden_states", "out_sample")},
            opset_version=18,
            dynamo=False,
        )
    return path


def random_edits(path: Path, number: int) -> list[Edit]:
    """Edits of every layer that reads the text, near the identity."""
    graph = Graph(path)
    sites = tuple(
        f"{module}.weight" for module in sorted(graph.modules) if module.endswith(("attn2.to_k", "attn2.to_v"))
    )
    weights = {}
    for site in sites:
        place = graph.locate(site)
        values = graph.values(place.initializer)
        weights[site] = values.T if place.transposed else values
    dim, random = weights[sites[0]].shape[1], np.random.default_rng(0)
    original = fingerprint(weights)

    def make(seed: int) -> Edit:
        metadata = EditMetadata(
            excise_version=importlib.metadata.version("excise"),
            method="random",
            recipe={"seed": seed},
            concepts=(),
            kept=Kept.of(()),
            token_rule="all",
            family="stable-diffusion",
            streams=(Stream(name="text", dim=dim, sites=sites),),
            weights_fingerprint=original,
            text_encoder_fingerprint="",
        )
        return Edit(metadata, {"text.transform": np.eye(dim) + random.standard_normal((dim, dim)) / dim})

    return [make(seed) for seed in range(number)]


def session(path: Path, threads: int, provider: str) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 3
    chosen = provider_options("cuda" if provider == "cuda" else "cpu", None, None)
    made = onnxruntime.InferenceSession(str(path), options, providers=chosen, enable_fallback=0)
    if made.get_providers()[0] != chosen[0][0]:
        raise SystemExit(f"{chosen[0][0]} can't start on this machine")
    return made


def step(model: onnxruntime.InferenceSession, size: str, requests: int, edits: int) -> Callable[[], float]:
    """One call of the UNet, timed in seconds; two rows for each request."""
    channels, side, tokens, width = SHAPES[size]
    random, rows = np.random.default_rng(0), 2 * requests
    feed: dict[str, Any] = {
        "sample": random.standard_normal((rows, channels, side, side), np.float32),
        "timestep": np.array(401.0, np.float32),
        "encoder_hidden_states": random.standard_normal((rows, tokens, width), np.float32),
    }
    feed = {node.name: feed[node.name].astype(DTYPES[node.type]) for node in model.get_inputs() if node.name in feed}
    if any(one.name == "edit_index" for one in model.get_inputs()):
        feed["edit_index"] = np.tile(np.arange(requests) % edits, 2)

    def run() -> float:
        start = time.perf_counter()
        model.run(None, feed)
        return time.perf_counter() - start

    return run


def paired(steps: Sequence[Callable[[], float]], repeat: int) -> Iterator[list[float]]:
    """Times of all ``steps`` one after another, ``repeat`` times; every other time backwards."""
    for one in steps:
        one()
    for number in range(repeat):
        order = range(len(steps)) if number % 2 == 0 else reversed(range(len(steps)))
        times = {place: steps[place]() for place in order}
        yield [times[place] for place in range(len(steps))]


def measure(
    folder: Path,
    size: str,
    edits: int,
    requests: Sequence[int],
    repeat: int,
    threads: int,
    provider: str,
    dtype: str,
) -> dict[str, Any]:
    """The document that is printed."""
    progress(f"exporting {size}")
    model = export_unet(size, folder, dtype, provider)
    progress(f"making a bank of {edits}")
    start = time.perf_counter()
    add_bank(model, folder / "bank.onnx", random_edits(model, edits), progress=progress)
    document: dict[str, Any] = {
        "size": size,
        "edits": edits,
        "add_bank_seconds": time.perf_counter() - start,
        "bank_bytes": edits * SHAPES[size][3] ** 2 * 4,
        "threads": threads,
        "provider": provider,
        "dtype": dtype,
        "repeat": repeat,
        "onnxruntime": onnxruntime.__version__,
        "steps": [],
    }
    plain_model, bank_model = (session(path, threads, provider) for path in (model, folder / "bank.onnx"))
    models = (plain_model, bank_model, plain_model)
    for number in requests:
        progress(f"{number} requests: {repeat} pairs")
        times = list(paired([step(one, size, number, edits) for one in models], repeat))
        plain = statistics.median(row[0] for row in times)
        document["steps"].append(
            {
                "requests": number,
                "plain_ms": 1000 * plain,
                **spread("bank", [row[1] - row[0] for row in times], plain),
                **spread("again", [row[2] - row[0] for row in times], plain),
            }
        )
    return document


def spread(name: str, differences: list[float], plain: float) -> dict[str, float]:
    """Median and quartiles of what a step costs more, in ms, and the median in per cent."""
    low, median, high = np.quantile(differences, [0.25, 0.5, 0.75])
    return {
        f"{name}_ms": 1000 * median,
        f"{name}_ms_low": 1000 * low,
        f"{name}_ms_high": 1000 * high,
        f"{name}_percent": 100 * median / plain,
    }


def progress(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--size", choices=tuple(SHAPES), default="demo")
    parser.add_argument("--edits", type=int, default=8, metavar="N", help="in the bank (8)")
    parser.add_argument("--requests", type=int, nargs="+", default=[1, 4], metavar="N", help="in a batch (1 4)")
    parser.add_argument("--repeat", type=int, default=20, metavar="N", help="pairs (20)")
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="of one operator (1)")
    parser.add_argument("--provider", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=("fp32", "fp16"), default="fp32")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    arguments = parser.parse_args()
    if min(arguments.edits, arguments.repeat, arguments.threads, *arguments.requests) < 1:
        parser.error("--edits, --requests, --repeat and --threads take 1 or more")
    with tempfile.TemporaryDirectory() as folder:
        document = measure(
            Path(folder),
            arguments.size,
            arguments.edits,
            arguments.requests,
            arguments.repeat,
            arguments.threads,
            arguments.provider,
            arguments.dtype,
        )
    if arguments.json:
        print(json.dumps(document, indent=2))
        return
    print(
        f"{document['size']}, {document['edits']} edits, {document['threads']} threads, "
        f"{document['provider']}, {document['dtype']}"
    )
    for row in document["steps"]:
        print(
            f"{row['requests']} requests: a step takes {row['plain_ms']:.2f} ms, the bank "
            f"{row['bank_ms']:+.3f} ms ({row['bank_ms_low']:+.3f} … {row['bank_ms_high']:+.3f}, "
            f"{row['bank_percent']:+.2f} %), the same model again {row['again_ms']:+.3f} ms "
            f"({row['again_ms_low']:+.3f} … {row['again_ms_high']:+.3f})"
        )


if __name__ == "__main__":
    main()
