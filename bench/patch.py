"""A new edit in an exported model: ``excise patch`` beside exporting again, and beside writing with the onnx package.

    python bench/patch.py [--size demo|sd14] [--folder DIR] [--work DIR] [--repeat N] [--without-optimum] [--json]

``sd14`` is Stable Diffusion 1.4's real configuration with random weights (``edit_process.py`` makes the folder once);
it takes about 15 GB of disk below ``--work`` and some minutes. Every figure is of a fresh process, wall time and peak
resident memory:

``optimum-cli``    ``optimum-cli export onnx`` of the pipeline, without an edit
``excise export``  the export with an edit
``excise patch``   another edit into that export, in place; the median of N
``onnx package``   the same initialisers replaced in a copy of the UNet by ``onnx.load`` and ``onnx.save``
``load``           opening the UNet in ONNX Runtime, without an edit and with one at load
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from edit_process import make_folder, measure, progress

REPLACE = """
import sys, onnx
from onnx import numpy_helper
from pathlib import Path
from excise.edited_initializers import edited_values
from excise.editfile import load_edit
source, edit, target = map(Path, sys.argv[1:])
values = edited_values(source, load_edit(edit))
model = onnx.load(source / "unet" / "model.onnx")
for tensor in model.graph.initializer:
    if tensor.name in values:
        tensor.CopyFrom(numpy_helper.from_array(values[tensor.name], tensor.name))
target.mkdir()
onnx.save(model, target / "model.onnx", save_as_external_data=True, location="model.onnx_data")
"""
LOAD = """
import sys
from pathlib import Path
from excise.edited_initializers import edited_values
from excise.editfile import load_edit
from excise.serve.onnx_component import OnnxComponent
folder = Path(sys.argv[1])
values = edited_values(folder, load_edit(Path(sys.argv[2]))) if len(sys.argv) > 2 else None
names = ["sample", "timestep", "encoder_hidden_states"]
OnnxComponent(folder, "unet", inputs=names, output="out_sample", provider="cpu", threads=None, initializers=values)
"""


def edits_of(model: Path, work: Path) -> list[Path]:
    """Two edits of the model, made once."""
    made = []
    for concept in ("gun", "axe"):
        made.append(work / f"{concept}.safetensors")
        if not made[-1].exists():
            progress(f"making the edit {concept}")
            command = [sys.executable, "-m", "excise", "edit", str(model), "--erase", concept, "--no-cache"]
            subprocess.run([*command, "--out", str(made[-1])], check=True, stdout=subprocess.DEVNULL)
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--size", choices=("demo", "sd14"), default="demo")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "excise-bench-sd14")
    parser.add_argument("--work", type=Path, help="where exports go; by default a temporary folder")
    parser.add_argument("--repeat", type=int, default=3, metavar="N")
    parser.add_argument("--without-optimum", action="store_true", help="leave optimum-cli out")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    arguments = parser.parse_args()
    if arguments.size == "demo":
        from excise.demo import MODEL as model
    else:
        model = arguments.folder
        if not model.exists():
            make_folder(model)
    with tempfile.TemporaryDirectory(dir=arguments.work) as temporary:
        figures = run(model, Path(temporary), arguments.repeat, not arguments.without_optimum)
    document = {"size": arguments.size, "cores": os.cpu_count(), "machine": platform.machine(), "figures": figures}
    table = "\n".join(f"{name:<28} {one['seconds']:8.2f} s {one['peak_gb']:6.2f} GB" for name, one in figures.items())
    print(json.dumps(document, indent=2) if arguments.json else table)


def run(model: Path, work: Path, repeat: int, optimum: bool) -> dict[str, dict[str, float]]:
    """Every figure, by name."""
    first, second = edits_of(model, work)
    excise = [sys.executable, "-m", "excise"]
    exported = str(work / "onnx")
    figures: dict[str, dict[str, float]] = {}

    def timed(name: str, commands: list[list[str]]) -> None:
        progress(name)
        runs = [measure(command) for command in commands]
        progress("  " + ", ".join(f"{seconds:.2f} s {memory:.2f} GB" for seconds, memory in runs))
        figures[name] = {"seconds": statistics.median(s for s, _ in runs), "peak_gb": max(memory for _, memory in runs)}

    if optimum:
        optimum_cli = [str(Path(sys.executable).with_name("optimum-cli")), "export", "onnx"]
        timed(
            "optimum-cli export onnx",
            [[*optimum_cli, "--model", str(model), "--task", "text-to-image", str(work / "optimum")]],
        )
    timed("excise export --edit", [[*excise, "export", str(model), "--edit", str(first), "--out", exported]])
    turns = [second if number % 2 == 0 else first for number in range(repeat)]
    timed("excise patch, in place", [[*excise, "patch", exported, "--edit", str(edit)] for edit in turns])
    outs = [str(work / f"version-{number}") for number in range(repeat)]
    timed("excise patch --out", [[*excise, "patch", exported, "--edit", str(second), "--out", out] for out in outs])
    for out in outs:
        subprocess.run(["rm", "-rf", out], check=True)
    timed("onnx package", [[sys.executable, "-c", REPLACE, exported, str(second), str(work / "package")]])
    timed("load", [[sys.executable, "-c", LOAD, exported]] * repeat)
    timed("load with an edit", [[sys.executable, "-c", LOAD, exported, str(second)]] * repeat)
    return figures


if __name__ == "__main__":
    main()
