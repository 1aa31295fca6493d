"""NudeNet's boxes of many images: ``NudityDetector`` beside the nudenet package's own loop, in one run.

    python bench/nudity_detector.py [--images N] [--repeat N] [--threads N] [--arrays] [--json]

Half of the images are enlarged cut-outs of a photograph with a face in it, half of photographs without anybody (all
ship in scikit-image), 512 × 512 as Stable Diffusion makes them. They are written as PNG files, and reading them counts
on both sides; ``--arrays`` leaves it out. The order of the two alternates, so that a slow moment of the machine hits
both alike; the figure is the median of the ratios. Boxes and scores are compared and must be the same.

``library``   ``NudeDetector.detect`` of each file, as the published evaluations call it
``batches``   its ``detect_batch``, four images at a time
``excise``    ``NudityDetector.detect``
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime
from nudenet import NudeDetector
from PIL import Image
from skimage import data

from excise.eval.boxes import Box
from excise.eval.nudity_detector import NudityDetector

SIDE = 512
#: Of scikit-image's ``astronaut``: cut-outs that hold these pixels (top, left, bottom, right) have the face in them.
FACE = (70, 160, 190, 290)


def progress(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def pictures(count: int, *, face: bool, seed: int) -> list[npt.NDArray[np.uint8]]:
    """``count`` cut-outs of photographs, enlarged to 512 × 512."""
    random = np.random.default_rng(seed)
    made = []
    for number in range(count):
        source = data.astronaut() if face else (data.chelsea(), data.coffee(), data.rocket())[number % 3]
        height, width = source.shape[:2]
        if face:
            top, left = int(random.integers(0, FACE[0])), int(random.integers(0, FACE[1]))
            bottom, right = int(random.integers(FACE[2], height)), int(random.integers(FACE[3], width))
        else:
            top, left = (int(random.integers(0, size // 2)) for size in (height, width))
            bottom, right = top + height // 2, left + width // 2
        cut = Image.fromarray(source[top:bottom, left:right]).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
        made.append(np.asarray(cut.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if random.random() < 0.5 else cut))
    return made


class Files(Sequence[Any]):
    """Images that are read when they are asked for."""

    def __init__(self, files: list[str]) -> None:
        self.files = files

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, row: Any) -> npt.NDArray[np.uint8]:
        with Image.open(self.files[row]) as image:
            return np.asarray(image.convert("RGB"))


def as_boxes(found: list[list[dict[str, Any]]]) -> list[tuple[Box, ...]]:
    return [tuple(Box(one["class"], one["score"], tuple(one["box"])) for one in boxes) for boxes in found]


def seconds(function: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    result = function()
    return time.perf_counter() - start, result


def compare(
    library: NudeDetector, ours: NudityDetector, given: list[Any], images: Any, repeat: int
) -> tuple[dict[str, list[float]], list[tuple[Box, ...]]]:
    """Seconds of each way, run by run, and the boxes."""
    ways: dict[str, Callable[[], Any]] = {
        "library": lambda: as_boxes([library.detect(one) for one in given]),
        "batches": lambda: as_boxes(library.detect_batch(given, batch_size=4)),
        "excise": lambda: ours.detect(images),
    }
    times: dict[str, list[float]] = {name: [] for name in ways}
    boxes: list[tuple[Box, ...]] = []
    for number in range(repeat):
        found = {}
        for name in ways if number % 2 == 0 else reversed(ways):
            taken, found[name] = seconds(ways[name])
            times[name].append(taken)
            progress(f"  {name:<8} {taken:6.2f} s")
        boxes = found["library"]
        if not found["excise"] == found["batches"] == boxes:
            raise SystemExit("the boxes differ")
    return times, boxes


def run(count: int, repeat: int, threads: int | None, arrays: bool) -> dict[str, Any]:
    """All figures."""
    load = round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None
    library, ours = NudeDetector(), NudityDetector(threads=threads)
    kinds: dict[str, Any] = {}
    totals: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for kind, face in (("with a face", True), ("without", False)):
            progress(f"{kind}: {count // 2} images")
            images = pictures(count // 2, face=face, seed=int(face))
            given: list[Any] = [np.ascontiguousarray(image[..., ::-1]) for image in images]
            read: Any = images
            if not arrays:
                given = [str(Path(folder) / f"{kind}-{number}.png") for number in range(len(images))]
                for file, image in zip(given, images, strict=True):
                    Image.fromarray(image).save(file)
                read = Files(given)
            times, boxes = compare(library, ours, given, read, repeat)
            kinds[kind] = {
                "images": len(images),
                "images_with_boxes": sum(map(bool, boxes)),
                "boxes": sum(map(len, boxes)),
                **figures(times),
            }
            for name, taken in times.items():
                totals[name] = [a + b for a, b in zip(totals.get(name, [0.0] * repeat), taken, strict=True)]
    return {
        "images": 2 * (count // 2),
        "read_from": "arrays" if arrays else "PNG files",
        "repeat": repeat,
        "threads": threads or "one more than cores",
        "cores": os.cpu_count(),
        "machine": platform.machine(),
        "load_before": load,
        "onnxruntime": onnxruntime.__version__,
        "detector": ours.fingerprint.name,
        "all": figures(totals),
        "by_kind": kinds,
    }


def figures(times: dict[str, list[float]]) -> dict[str, Any]:
    """Medians in seconds, and the medians of the ratios of each run."""

    def ratio(name: str) -> float:
        return statistics.median(a / b for a, b in zip(times[name], times["excise"], strict=True))

    return {
        "seconds": {name: statistics.median(taken) for name, taken in times.items()},
        "library_over_excise": ratio("library"),
        "batches_over_excise": ratio("batches"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--images", type=int, default=500, metavar="N", help="half of them with a face (500)")
    parser.add_argument("--repeat", type=int, default=3, metavar="N", help="runs of each (3)")
    parser.add_argument("--threads", type=int, metavar="N", help="of excise; by default one more than cores")
    parser.add_argument("--arrays", action="store_true", help="images in memory: reading files doesn't count")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    arguments = parser.parse_args()
    if arguments.images < 4 or arguments.repeat < 1:
        parser.error("--images takes 4 or more, --repeat 1 or more")
    result = run(arguments.images, arguments.repeat, arguments.threads, arguments.arrays)
    if arguments.json:
        print(json.dumps(result, indent=2))
        return
    print(
        f"{result['images']} images from {result['read_from']}, {result['detector']}, onnxruntime "
        f"{result['onnxruntime']}, {result['cores']} cores ({result['machine']}), load before {result['load_before']}, "
        "same boxes and scores"
    )
    for kind, one in (("all", result["all"]), *result["by_kind"].items()):
        taken = "".join(f"{name} {value:6.2f} s   " for name, value in one["seconds"].items())
        print(f"{kind:<12} {taken}library/excise {one['library_over_excise']:.2f}")


if __name__ == "__main__":
    main()
