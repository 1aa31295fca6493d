"""``excise verify``: is what will be served the edited model, in every component and through the whole loop?

A is the reference (the edited PyTorch pipeline, or another export), B what is to be served, and the unedited model
gives the scale. One of them is in memory at a time.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass

from pydantic import BaseModel, ConfigDict
from tqdm import tqdm

from excise.edited_initializers import base_weights
from excise.editfile import Edit
from excise.errors import ArtefactError, FingerprintMismatch, NumericsError, UsageError
from excise.eval.verification_measures import (
    OUTPUTS,
    Outputs,
    Probe,
    Settings,
    Tick,
    check_finite,
    make_probe,
    measure_components,
    measure_loop,
    shown,
)
from excise.eval.verification_prompts import Prompts
from excise.eval.verification_sides import (
    Description,
    LoadPipeline,
    Rounding,
    Side,
    SideSpec,
    check_side,
    coarsest,
    open_side,
)
from excise.eval.verification_verdict import DEFAULTS, Row, Thresholds, judge_output, moves
from excise.manifest import read_manifest


class Verification(BaseModel):
    """A finished verification.

    Attributes:
        a, b, base: The reference, what is to be served, and the unedited model.
        edit: Id of the edit, where an edit file was given.
        rounding: The coarser of A's and B's, which chose the default tolerances.
        thresholds: As applied.
        settings: Of the loop.
        prompts: By group.
        source: Where the erased prompts are from.
        end_to_end: Whether single components were left out.
        rows: Every output on every group.
    """

    model_config = ConfigDict(frozen=True)

    a: Description
    b: Description
    base: Description
    edit: str | None
    rounding: Rounding
    thresholds: Thresholds
    settings: Settings
    prompts: dict[str, tuple[str, ...]]
    source: str
    end_to_end: bool
    rows: tuple[Row, ...]

    @property
    def passed(self) -> bool:
        """Whether every row passed."""
        return bool(self.rows) and all(row.passed for row in self.rows)

    @property
    def failures(self) -> tuple[Row, ...]:
        """The rows that failed, the worst first."""
        return tuple(sorted((row for row in self.rows if not row.passed), key=lambda row: -row.used))


@dataclass(frozen=True)
class _Run:
    """What every side of one verification is measured with."""

    prompts: Prompts
    settings: Settings
    load_pipeline: LoadPipeline
    edit: Edit | None
    tick: Tick

    def reference(self, spec: SideSpec) -> tuple[Outputs, Probe, Side]:
        """A's outputs, which are finite, what the others are given, and A."""
        side = _opened("A", spec, self.load_pipeline, self.edit)
        found = measure_loop(side, self.prompts, self.settings, self.tick)
        probe = make_probe(side, found, self.prompts, self.settings)
        found |= measure_components(side, probe, self.tick)
        check_finite("A", found)
        return found, probe, side

    def other(self, name: str, side: Side, probe: Probe, reference: Outputs) -> Outputs:
        """The outputs of B or the base, which have the reference's shapes."""
        here, there = side.runtime.latent_shape, next(iter(probe.latents.values())).shape[1:]
        if tuple(here) != there:
            raise UsageError(f"{name} {side.spec} has latents of shape {here}, A of {there}: name exports of one model")
        found = measure_loop(side, self.prompts, self.settings, self.tick)
        _check_alike(name, found, reference)
        return found | measure_components(side, probe, self.tick)


def verify(
    a: SideSpec,
    b: SideSpec,
    base: SideSpec,
    prompts: Prompts,
    settings: Settings,
    load_pipeline: LoadPipeline,
    *,
    edit: Edit | None = None,
    adjust: Callable[[Thresholds], Thresholds] = lambda thresholds: thresholds,
    end_to_end: bool = False,
    say: Callable[[str], None] = lambda message: None,
) -> Verification:
    """Measure the three models in turn and judge every output; a bar on stderr shows how far it is.

    Args:
        a, b, base: See the module.
        prompts: With ``erased`` ones, which the edit must move.
        settings: Of the loop.
        load_pipeline: For torch sides.
        edit: Must be made for the base's weights, and be the one that A and B say they carry, if they say.
        adjust: Makes the tolerances of the defaults for the precision that A and B compute in.
        end_to_end: Judge latents and images alone, as for an edit that sits in another component of B than of A.
        say: Told each step, one line at a time.

    Raises:
        UsageError: The models differ in shape or schedule, or the base carries an edit.
        ArtefactError, ModelError: A folder isn't a pipeline.
        FingerprintMismatch: The edit is another model's, or not the one that A or B carries.
        NumericsError: A or the base gives values that aren't finite, or the edit moves no output of an erased prompt.
    """
    for spec in (a, b, base):
        check_side(spec)
    total = 3 * len(prompts.groups) * (settings.num_inference_steps + settings.timesteps)
    with tqdm(total=total, desc="verify", unit="call", file=sys.stderr, leave=False, delay=2) as bar:

        def tell(message: str) -> None:
            bar.clear()
            say(message)

        run = _Run(prompts, settings, load_pipeline, edit, bar.update)
        tell(f"1/3 the reference {a}")
        found_a, probe, side = run.reference(a)
        described_a = side.description
        del side  # one model in memory at a time

        tell(f"2/3 the unedited model {base}")
        side = _opened("base", base, load_pipeline, None)
        _check_base(side, edit)
        found_base, described_base = run.other("base", side, probe, found_a), side.description
        del side
        check_finite("base", found_base)
        _check_moved(a, base, found_base, found_a, adjust(DEFAULTS[described_a.rounding]))

        tell(f"3/3 what is to be served {b}")
        side = _opened("B", b, load_pipeline, edit)
        found_b, described_b = run.other("B", side, probe, found_a), side.description
    rounding = coarsest(described_a.rounding, described_b.rounding)
    thresholds = adjust(DEFAULTS[rounding])
    judged = [key for key in found_a if not end_to_end or OUTPUTS[key[0]] == "loop"]
    return Verification(
        a=described_a,
        b=described_b,
        base=described_base,
        edit=edit.id if edit else None,
        rounding=rounding,
        thresholds=thresholds,
        settings=settings,
        prompts=prompts.groups,
        source=prompts.source,
        end_to_end=end_to_end,
        rows=tuple(judge_output(key, found_base[key], found_a[key], found_b[key], thresholds) for key in judged),
    )


def _check_moved(a: SideSpec, base: SideSpec, found_base: Outputs, found_a: Outputs, thresholds: Thresholds) -> None:
    """Raise ``NumericsError`` unless the edit moves an output of an erased prompt: there would be no scale."""
    if not any(moves(key, found_base[key], found_a[key], thresholds) for key in found_a if key[1] == "erased"):
        raise NumericsError(
            f"the edit moves nothing on the erased prompts beyond the tolerance: A {a} computes what the base {base} "
            "does; name the edited model as A, or what was erased with --erased"
        )


def _opened(name: str, spec: SideSpec, load_pipeline: LoadPipeline, edit: Edit | None) -> Side:
    """A side, which must not say that it carries another edit than ``edit``."""
    side = open_side(spec, load_pipeline)
    carried = side.description.edit
    if edit is not None and carried not in (None, edit.id):
        raise FingerprintMismatch(
            f"{name} {spec} carries the edit {carried[:12]}, and --edit is {edit.id[:12]}: name the one that it was "
            "exported with"
        )
    return side


def _check_base(side: Side, edit: Edit | None) -> None:
    """Raise unless a side is unedited, and ``edit`` was made for it as far as its weights are to be had."""
    if side.description.edit is not None:
        raise UsageError(f"--base {side.spec} carries the edit {side.description.edit[:12]}: name the unedited model")
    if edit is None:
        return
    try:
        weights = side.weights(edit.sites)
        if weights is not None:
            edit.check(weights)
            return
        manifest = read_manifest(side.spec.folder)
        with base_weights(side.spec.folder, manifest) as stored:
            if {*edit.sites} <= {*stored}:  # an export may keep those alone that read the text
                edit.check(stored)
    except FingerprintMismatch as error:
        raise FingerprintMismatch(
            f"--edit is for another model than --base {side.spec}: name the model that it was made for"
        ) from error
    except ArtefactError:
        return  # a plain export keeps no weights by their torch names: there is nothing to compare


def _check_alike(name: str, found: Outputs, reference: Outputs) -> None:
    """Raise ``UsageError`` unless a side's loop has the steps and shapes of the reference's."""
    loop = [key for key in reference if key[0] in ("text_encoder", "pooled_text", "latents", "images")]
    if [key for key in found if key[0] == "pooled_text"] != [key for key in loop if key[0] == "pooled_text"]:
        raise UsageError(f"one of A and {name} is SDXL, and the other one isn't: name exports of one model")
    if sorted(map(str, found)) != sorted(map(str, loop)):
        counts = [sum(key[0] == "latents" for key in keys) for keys in (loop, found)]
        raise UsageError(f"A takes {counts[0]} steps over all groups, {name} {counts[1]}: they have other schedulers")
    for key in loop:
        if found[key].shape != reference[key].shape:
            raise UsageError(
                f"{shown(key)}: shape {reference[key].shape} in A and {found[key].shape} in {name}: "
                "name exports of one model"
            )
