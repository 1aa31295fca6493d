"""The runtimes of an ablation: edits of one preset that differ in one figure, made of the unedited model's folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from excise.cli_solve import solve
from excise.console import say
from excise.errors import UsageError

if TYPE_CHECKING:
    from excise.edit.recipe import Recipe
    from excise.editfile import Edit
    from excise.eval.protocol_choice import Choice
    from excise.eval.protocol_schema import Sweep
    from excise.eval.runtime_spec import RuntimeSpec


@dataclass(frozen=True)
class SweptRuntimes:
    """One runtime for each value, and the seconds that its edit took to make, by its name."""

    specs: tuple[RuntimeSpec, ...]
    seconds: Mapping[str, float]


def swept_runtimes(
    choice: Choice, sweep: Sweep, specs: Sequence[RuntimeSpec], base: str | None, out: Path
) -> SweptRuntimes:
    """Make the edits of an ablation that aren't there yet, in ``out/edits``.

    Where the run says what was erased (``--set erased=``), the preset's edits erase that.

    Raises:
        UsageError: no unedited model of PyTorch among the runtimes, or one that has a sweep's name.
        ArtefactError: an edit that is there is of another recipe.
        ExciseError: as solving for an edit raises.
    """
    from excise.edit.made_edits import made_edits
    from excise.edit.recipe import resolve
    from excise.eval.run_folder import EDITS
    from excise.eval.runtime_spec import parse_runtime, with_options

    unedited = next((spec for spec in specs if spec.name == base), None)
    if unedited is None or unedited.kind != "torch" or "edit" in unedited.options:
        raise UsageError("--sweep makes its edits of the unedited model: give --runtime base=torch:DIR")
    if taken := next((spec.name for spec in specs if spec.name in sweep.runtimes), None):
        raise UsageError(f"--runtime {taken}=…: the sweep has a runtime of that name; give yours another")
    erased = _erased(choice)
    recipes: dict[str, Recipe] = {}
    for name, value in sweep.runtimes.items():
        figure = int(value) if sweep.parameter == "epochs" else value
        recipes[name] = resolve(sweep.preset, None, {sweep.parameter: figure, "erase": erased or None})

    def solved(recipe: Recipe, checkpoints: Path) -> Edit:
        device = unedited.options.get("device", "cpu")
        return solve(unedited.place, recipe, device, certificate=False, cached=True, checkpoints=checkpoints)

    made = made_edits(out / EDITS, recipes, solved, say)
    place = unedited.source.partition("?")[0]
    return SweptRuntimes(
        tuple(
            parse_runtime(f"{name}={with_options(place, {**unedited.options, 'edit': str(file)})}")
            for name, file in made.files.items()
        ),
        made.seconds,
    )


def _erased(choice: Choice) -> list[str]:
    """The labels that the run says were erased; none where the protocol says it itself."""
    if "erased" not in choice.protocol.parameters:
        return []
    return list(dict.fromkeys(case.label for case in choice.all_cases() if case.group == "erased" and case.label))
