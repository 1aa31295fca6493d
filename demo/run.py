"""``excise demo``: edit, export, generate and judge the bundled model, and say whether it passed."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from excise.demo import CLIP, MODEL
from excise.demo.vocabulary import WEAPONS
from excise.edit.erase import erase
from excise.edit.recipe import Recipe, resolve
from excise.editfile import Edit, save_edit
from excise.eval.detector import ClipDetector
from excise.eval.judge import judge
from excise.eval.protocol import Protocol, demo_weapons
from excise.eval.report import as_json, table, write_report
from excise.eval.results import BASE, EDITED_ONNX, EDITED_TORCH
from excise.eval.torch_runtime import TorchRuntime
from excise.eval.verdict import decide
from excise.export.onnx_export import export_pipeline
from excise.export.pipeline import load_pipeline
from excise.output import check_free, new_folder
from excise.serve.onnx_runtime import OnnxRuntime


@dataclass(frozen=True)
class Outcome:
    """What ``excise demo`` prints, and its exit status."""

    passed: bool
    document: dict[str, Any]
    text: str


def run_demo(
    out: Path,
    *,
    onnx: Path | None = None,
    protocol: Protocol | None = None,
    recipe: Recipe | None = None,
    say: Callable[[str], None] = lambda message: None,
) -> Outcome:
    """The whole loop. ``out`` appears whole or not at all, also when the verdict is a failure.

    Args:
        onnx: an exported folder to judge in place of the edited model's own export.
        protocol: what is generated and counted; ``demo_weapons()`` when None.
        recipe: the edit; the preset ``weapons`` when None.

    Raises:
        OutputError: ``out`` holds something already or can't be written.
        ArtefactError: ``onnx`` is not an exported folder.
    """
    started = time.monotonic()
    check_free(out)
    protocol = protocol or demo_weapons()
    with new_folder(out) as folder:
        say("1/4 edit: erasing " + ", ".join(WEAPONS))
        edit = erase(MODEL, recipe or resolve("weapons", None, {}), progress=say)
        save_edit(folder / "edit.safetensors", edit)
        parity = {}
        if onnx is None:
            say("2/4 export: ONNX through Optimum")
            manifest = export_pipeline(MODEL, folder / "onnx", edit=edit, progress=say)
            parity = dict(manifest.parity)
        else:
            say(f"2/4 export: skipped, judging {onnx}")
        say("3/4 generate: three runtimes, the same prompts and seeds")
        results = judge(
            protocol,
            {
                BASE: TorchRuntime(load_pipeline(MODEL), name="torch, unedited"),
                EDITED_TORCH: TorchRuntime(load_pipeline(MODEL, edit), name="torch, edited"),
                EDITED_ONNX: OnnxRuntime(onnx or folder / "onnx", name="ONNX Runtime"),
            },
            ClipDetector(CLIP, protocol.labels),
        )
        say("4/4 judge")
        verdict = decide(results)
        context = _context(edit, parity, onnx)
        write_report(folder, results, verdict, context)
    document = {**as_json(results, verdict, context), "folder": str(out), "seconds": time.monotonic() - started}
    text = f"{table(results, verdict)}\n\n{out}/report.html  ({time.monotonic() - started:.0f} s)"
    return Outcome(verdict.passed, document, text)


def _context(edit: Edit, parity: dict[str, float], onnx: Path | None) -> dict[str, Any]:
    """What the report names beside the measurements."""
    return {
        "edit": edit.id,
        "edit summary": edit.summary,
        "artefact": "exported from this edit" if onnx is None else f"given: {onnx.name}",
        **{name.replace("_", " "): value for name, value in parity.items()},
    }
