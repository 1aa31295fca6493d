"""Solving for an edit from the command line: where, what is measured, and how RECE's epochs are judged."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from excise.console import needs, say
from excise.errors import UsageError

if TYPE_CHECKING:
    from excise.edit.auto_epochs import Probe
    from excise.edit.recipe import Recipe
    from excise.editfile import Edit
    from excise.editmetadata import StageFigures

F = TypeVar("F", bound=Callable[..., Any])


device_option = click.option(
    "--device", default="cpu", show_default=True, metavar="DEVICE", help="cpu, cuda, cuda:1, …"
)
cache_option = click.option("--no-cache", is_flag=True, help="Neither read nor write cached embeddings.")


def running_options(function: F) -> F:
    """Where an edit is computed, what is measured, and how RECE's epochs are judged."""
    texts: dict[str, Any] = {"multiple": True, "metavar": "TEXT"}
    options = [
        device_option,
        click.option("--no-certificate", is_flag=True, help="Don't measure how well the concept can be brought back."),
        cache_option,
        click.option("--detector", metavar="clip:DIR", help="Judge RECE's epochs by pictures; clip:demo is bundled."),
        click.option("--detector-label", "detector_labels", help="What counts; else what is erased.", **texts),
        click.option(
            "--detector-other", "detector_others", help="What doesn't; else targets and what is kept.", **texts
        ),
        click.option("--detector-images", type=int, default=4, show_default=True, help="Pictures for each concept."),
    ]
    for option in reversed(options):
        function = option(function)
    return function


def solve(
    model: str,
    recipe: Recipe,
    device: str,
    *,
    certificate: bool,
    cached: bool,
    judging: dict[str, Any] | None = None,
    checkpoints: Path | None = None,
) -> Edit:
    """The edit that a recipe gives of a model.

    Args:
        judging: the values of ``--detector`` and its companions by name; None judges nothing.
        checkpoints: the folder of a method that trains.

    Raises:
        ExciseError: whatever a user can put right.
    """
    with needs():
        from excise.edit.cache import EmbeddingCache, default_folder
        from excise.edit.erase import erase
        from excise.edit.model_folder import resolve
    cache = EmbeddingCache(default_folder(say) if cached else None, say=say)
    folder = resolve(model)
    probe = _probe(folder, recipe, device, judging) if judging else None
    return erase(
        folder,
        recipe,
        device=device,
        certificate=certificate,
        cache=cache,
        probe=probe,
        checkpoints=checkpoints,
        progress=say,
    )


def _probe(folder: Path, recipe: Recipe, device: str, judging: dict[str, Any]) -> Probe | None:
    """RECE's epochs judged by pictures, where a detector is given."""
    if judging["detector"] is None:
        if judging["labels"] or judging["others"]:
            raise UsageError("--detector-label and --detector-other need --detector clip:DIR")
        return None
    with needs("eval"):
        from excise.edit.model_folder import read_sites
        from excise.edit.site_selection import selection
        from excise.eval.clip_probe import clip_probe
        from excise.export.pipeline import load_pipeline
    sites = read_sites(folder, select=selection(recipe, folder, values_only=False))
    return clip_probe(recipe, sites, lambda: load_pipeline(folder), device=device, **judging)


def stage_lines(made: Edit) -> list[str]:
    """The figures of each stage, or of a training, for people."""
    lines = []
    for stage in made.metadata.stages:
        margin = "" if stage.margin is None else f"margin {stage.margin:.4f}  "
        shown = "" if stage.detected is None else f"  detected {stage.detected:.0%}"
        after = "" if stage.detected_after is None else f" → {stage.detected_after:.0%}"
        left_out = "" if stage.accepted else f"  (left out: {_why(stage)})"
        lines.append(f"  {stage.stream} {stage.stage:<9} {margin}kept moved {stage.moved:.2e}{shown}{after}{left_out}")
    if (run := made.metadata.training) is not None:
        lines.append(
            f"  trained {run.iterations} iterations: loss {run.loss_before:.3g} → {run.loss_after:.3g}, "
            f"{100 * run.share_of_parameters:.3g} % of the parameters"
        )
    return lines


def _why(stage: StageFigures) -> str:
    """Why an epoch was left out."""
    if stage.detected is None:
        return "the margin gains too little"
    if stage.detected_after is None:
        return "nothing is detected any more"
    return "more is detected" if stage.detected_after > stage.detected else "the margin doesn't rise"
