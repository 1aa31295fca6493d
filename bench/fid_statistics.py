"""FID statistics of a folder of images: excise beside clean-fid, in time and memory.

    python bench/fid_statistics.py [--json] [--images N] [--size PIXELS] [--batch N] [--seed N]

Both read the same PNG files, resize them with clean-fid's own function, run the same network through clean-fid's own
wrapper, and end with the mean and the covariance of 2048 features. The network is a random stand-in for Inception, and
small, so that what the two do differently isn't hidden behind it; with Inception both would take far longer. Each side
is a process of its own, whose peak memory (``ru_maxrss``; of clean-fid without its workers) is read at its end. A run
with a fifth of the images says what memory grows with.

*excise*     resizes in threads while the network reads the batch before, and adds each batch to exact sums.
*clean-fid*  resizes in as many worker processes as there are cores, keeps all features, then ``np.mean`` and ``np.cov``
             as its ``compare_folders`` has it.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from cleanfid.fid import get_folder_features
from cleanfid.inception_torchscript import InceptionV3W
from PIL import Image

from excise.eval.feature_statistics import extract_statistics
from excise.eval.inception import WEIGHTS, InceptionExtractor

#: Images that are in memory at once, in batches.
CHUNK = 16


class Network(torch.nn.Module):
    """From 299 × 299 to 2048 features in two random layers, in the attributes that clean-fid's wrapper reads."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.Sequential(
            torch.nn.Conv2d(3, 32, 13, 13),
            torch.nn.AdaptiveAvgPool2d(4),
            torch.nn.Flatten(),
            torch.nn.Linear(512, 2048),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        features: torch.Tensor = self.layers(x)
        return features


def prepare(folder: Path, images: int, size: int, seed: int) -> None:
    """Write the stand-in network, and ``images`` PNG files of smooth noise; every fifth is also in ``few``."""
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r".*torch\.jit", FutureWarning)
        torch.jit.save(torch.jit.script(Network()), folder / WEIGHTS)
    rng = np.random.default_rng(seed)
    (folder / "many").mkdir()
    (folder / "few").mkdir()
    for number in range(images):
        coarse = Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8))
        file = folder / "many" / f"{number:06}.png"
        coarse.resize((size, size), Image.Resampling.BICUBIC).save(file)
        if number % 5 == 0:
            os.link(file, folder / "few" / file.name)


def excise(folder: Path, files: Path, batch: int) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Mean and covariance."""
    extractor = InceptionExtractor(folder, batch_size=batch)
    names = sorted(files.iterdir())

    def chunks() -> Iterator[list[npt.NDArray[np.uint8]]]:
        for start in range(0, len(names), CHUNK * batch):
            yield [np.asarray(Image.open(name).convert("RGB")) for name in names[start : start + CHUNK * batch]]

    statistics = extract_statistics(extractor, chunks())
    return statistics.mean(), statistics.covariance()


def cleanfid(folder: Path, files: Path, batch: int) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Mean and covariance."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r".*torch\.jit", FutureWarning)
        network = InceptionV3W(str(folder), download=False).eval()
    features = get_folder_features(
        str(files),
        network,
        num_workers=len(os.sched_getaffinity(0)),
        batch_size=batch,
        device=torch.device("cpu"),
        mode="clean",
        verbose=False,
    )
    return np.mean(features, axis=0), np.cov(features, rowvar=False)


SIDES = {"excise": excise, "clean-fid": cleanfid}


def side(name: str, folder: Path, files: Path, batch: int) -> None:
    """Run one side in this process: its moments go to a file, its time and peak memory to stdout."""
    start, cpu = time.perf_counter(), cpu_seconds()
    mean, covariance = SIDES[name](folder, files, batch)
    seconds, cpu = time.perf_counter() - start, cpu_seconds() - cpu
    np.savez(folder / f"{name}-{files.name}.npz", mean=mean, covariance=covariance)
    mebibytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps({"seconds": seconds, "cpu_seconds": cpu, "peak_mib": mebibytes}))


def cpu_seconds() -> float:
    """Of this process and of the workers that have ended: what other programs on the machine change least."""
    usages = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def run(images: int, size: int, batch: int, seed: int) -> dict[str, object]:
    """All timings (seconds; networks are loaded within them, libraries before) and peaks (MiB)."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        progress(f"{images} images")
        prepare(folder, images, size, seed)
        measured: dict[str, dict[str, float]] = {}
        for files in ("few", "many"):
            for each in SIDES:
                progress(f"{each}: {files}")
                command = [sys.executable, __file__, "--side", each, "--folder", name, "--files", files]
                done = subprocess.run([*command, "--batch", str(batch)], check=True, stdout=subprocess.PIPE, text=True)
                measured[f"{each} {files}"] = json.loads(done.stdout.splitlines()[-1])
        ours, theirs = (np.load(folder / f"{each}-many.npz") for each in SIDES)
        difference = {key: float(np.abs(ours[key] - theirs[key]).max()) for key in ("mean", "covariance")}
        scale = {key: float(np.abs(theirs[key]).max()) for key in ("mean", "covariance")}
    return {
        "images": {"few": -(-images // 5), "many": images},
        "size": size,
        "batch": batch,
        "seed": seed,
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "measured": measured,
        "cleanfid_over_excise": {
            key: measured["clean-fid many"][key] / measured["excise many"][key] for key in ("seconds", "cpu_seconds")
        },
        "growth_mib": {
            each: measured[f"{each} many"]["peak_mib"] - measured[f"{each} few"]["peak_mib"] for each in SIDES
        },
        "largest_difference": difference,
        "largest_entry": scale,
    }


def progress(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    parser.add_argument("--images", type=int, default=5000, metavar="N", help="PNG files (5000)")
    parser.add_argument("--size", type=int, default=64, metavar="PIXELS", help="their width and height (64)")
    parser.add_argument("--batch", type=int, default=32, metavar="N", help="images in a batch, of both sides (32)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of network and images (0)")
    parser.add_argument("--side", choices=sorted(SIDES), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--files", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.side:
        side(arguments.side, arguments.folder, arguments.folder / arguments.files, arguments.batch)
        return
    if arguments.images < 10 or arguments.size < 8 or arguments.batch < 1:
        parser.error("--images takes 10 or more, --size 8 or more, --batch 1 or more")
    result = run(arguments.images, arguments.size, arguments.batch, arguments.seed)
    if arguments.json:
        print(json.dumps(result, indent=2))
        return
    print(f"{result['images']} images of {result['size']} pixels, {result['cores']} cores, torch {result['torch']}")
    measured = result["measured"]
    assert isinstance(measured, dict)
    for name, figures in measured.items():
        seconds, cpu, peak = (figures[key] for key in ("seconds", "cpu_seconds", "peak_mib"))
        print(f"  {name:<20}{seconds:>8.1f} s{cpu:>8.1f} s of CPU{peak:>9.0f} MiB")
    for name in ("cleanfid_over_excise", "growth_mib", "largest_difference", "largest_entry"):
        print(f"{name.replace('_', ' '):<29}{result[name]}")


if __name__ == "__main__":
    main()
