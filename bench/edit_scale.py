"""How an edit's time and memory grow: Stable Diffusion XL's shapes, many concepts, more layers.

    python bench/edit_scale.py sdxl [--repeat N]
    python bench/edit_scale.py concepts [--layers N] [--most N]
    python bench/edit_scale.py layers

``sdxl``      70 cross-attention layers, 2048 wide, one concept, UCE and three epochs: seconds, and peak memory beyond
              the weights, of which one edited copy at a time is held.
``concepts``  1, 10, 100, 1000 concepts on the first layers of Stable Diffusion 1.4, by excise with three epochs, by
              excise and by the published form with UCE's stage alone; each one's exponent between its last two sizes.
``layers``    1 to 16 layers, one concept, UCE's stage alone, by both forms, and the exponents.

The published form is ``closed_form.py``'s; ``--most`` is the most concepts that it is run with.
"""

from __future__ import annotations

import argparse
import json
import math
import resource
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from closed_form import EPOCH_SCALES, RIDGE, UCE_SCALES, WIDTHS, Published, excise, problem, progress, seconds

from excise.edit.rece import rece
from excise.edit.transform import Transform

SDXL = (640,) * 4 + (1280,) * 60 + (640,) * 6


def resident() -> tuple[float, float]:
    """Resident GB now, and the most so far."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 1e9, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


def sdxl(repeat: int) -> dict[str, object]:
    given = problem(SDXL, 0, dim=2048)
    before = resident()[0]
    solving, applying = [], []

    def solve() -> Transform:
        scales = {"uce_scales": UCE_SCALES, "epoch_scales": EPOCH_SCALES}
        return rece(given.weights, given.concepts, [given.kept], epochs=3, ridge=RIDGE, **scales).transform

    def apply(transform: Transform) -> None:
        for weight in given.weights:
            transform.on_weight(weight)

    for number in range(repeat):
        progress(f"sdxl: run {number + 1} of {repeat}")
        start = time.perf_counter()
        transform = solve()
        solving.append(time.perf_counter() - start)
        start = time.perf_counter()
        apply(transform)
        applying.append(time.perf_counter() - start)
    return {
        "solve_seconds": statistics.median(solving),
        "apply_seconds": statistics.median(applying),
        "weights_gb": sum(weight.nbytes for weight in given.weights) / 1e9,
        "peak_beyond_weights_gb": resident()[1] - before,
    }


def concepts(layers: int, most: int) -> dict[str, object]:
    sizes = (1, 10, 100, 1000)
    curves: dict[str, dict[int, float]] = {"excise_three_epochs": {}, "excise_uce": {}, "published_uce": {}}
    for size in sizes:
        progress(f"concepts: {size}")
        given = problem(WIDTHS[:layers], 0, concepts=size)
        curves["excise_three_epochs"][size] = seconds(lambda given=given: excise(given))
        curves["excise_uce"][size] = seconds(lambda given=given: excise(given, 0))
        if size <= most:
            curves["published_uce"][size] = seconds(lambda given=given: Published(None)(given, 0))
    return {"layers": layers, "seconds": curves, "exponent": {name: exponent(curve) for name, curve in curves.items()}}


def layers() -> dict[str, object]:
    curves: dict[str, dict[int, float]] = {"excise_uce": {}, "published_uce": {}}
    runs: dict[str, Callable[..., object]] = {
        "excise_uce": lambda given: excise(given, 0),
        "published_uce": lambda given: Published(None)(given, 0),
    }
    for count in (1, 2, 4, 8, 16):
        progress(f"layers: {count}")
        # Of one width, so that only their number grows.
        given = problem((640,) * count, 0)
        for name, run in runs.items():
            curves[name][count] = min(seconds(lambda given=given, run=run: run(given)) for _ in range(3))
    return {"seconds": curves, "exponent": {name: exponent(curve) for name, curve in curves.items()}}


def exponent(curve: Mapping[int, float]) -> float:
    """Of the power law through the last two points."""
    (small, fast), (large, slow) = list(curve.items())[-2:]
    return math.log(slow / fast) / math.log(large / small)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, usage="%(prog)s WHAT [options]"
    )
    parser.add_argument("what", choices=["sdxl", "concepts", "layers"])
    parser.add_argument("--repeat", type=int, default=3, metavar="N")
    parser.add_argument("--layers", type=int, default=2, metavar="N", help="1 to 16 (2)")
    parser.add_argument("--most", type=int, default=1000, metavar="N", help="concepts for the published form (1000)")
    arguments = parser.parse_args()
    with torch.inference_mode():
        if arguments.what == "sdxl":
            document = sdxl(arguments.repeat)
        elif arguments.what == "concepts":
            document = concepts(arguments.layers, arguments.most)
        else:
            document = layers()
    json.dump({**document, "torch": torch.__version__, "threads": torch.get_num_threads()}, sys.stdout, indent=2)
    print()


if __name__ == "__main__":
    main()
