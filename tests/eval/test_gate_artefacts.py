"""The gate on the demo model: every right artefact passes, and every wrong one fails by what it does.

Provenance is left out of the policy on purpose: a wrong engine can carry a right manifest. What remains are the demo
policy's rules on images. Set ``EXCISE_GATE_TABLE`` to a file to append a line for each artefact.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from excise.demo import MODEL
from excise.edit.erase import erase
from excise.edit.recipe import resolve
from excise.editfile import Edit
from excise.errors import ArtefactError
from excise.eval.cases import Case
from excise.eval.evaluation import Evaluation, ProtocolRecord, Provenance
from excise.eval.gate import decide
from excise.eval.gate_result import GateResult
from excise.eval.image_generation import GenerationSettings, generate
from excise.eval.measure_names import metric_of
from excise.eval.observation_cache import Pictures
from excise.eval.paired_outcomes import tango
from excise.eval.policy import BaseRule, Bound, Limit, Policy, load_policy
from excise.eval.protocol_choice import Choice
from excise.eval.protocol_comparisons import Roles
from excise.eval.protocol_file import load_protocol
from excise.eval.protocol_models import ProtocolModels
from excise.eval.protocol_record import record
from excise.eval.run_images import RunImages
from excise.eval.runtime_spec import parse_runtime
from excise.eval.torch_runtime import TorchRuntime
from excise.export.onnx_export import export_pipeline
from excise.export.pipeline import load_pipeline
from excise.serve.runtime import Runtime
from tests.eval.artefact_workshop import Workshop
from tests.eval.right_artefacts import RIGHT
from tests.eval.wrong_artefacts import FEW, WRONG

CASES, STEPS, BATCH = 16, 8, 8
PROTOCOL = load_protocol("demo-weapons")
CHOICE = Choice(PROTOCOL, sample=CASES, num_inference_steps=STEPS)
#: Of the demo policy's rules, those on images: as they are, and with the bound on a rate that so few pairs can meet.
MEASURES, RATES = (
    ("relative_to_edit", "clip_score_drop", "detected_flips_p_value"),
    {"detected_increase": "erased", "recognised_drop": "kept"},
)
#: Further seeds of the same prompts.
SEEDS = (0, 1000, 2000, 3000)


@pytest.fixture(scope="module")
def weapons() -> Edit:
    return erase(MODEL, resolve("weapons", None, {}), certificate=False)


@pytest.fixture(scope="module")
def workshop(weapons: Edit, tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    folder = tmp_path_factory.mktemp("gate")
    export_pipeline(MODEL, folder / "right", edit=weapons)
    return Workshop(folder / "right", weapons, folder)


@pytest.fixture(scope="module")
def models() -> ProtocolModels:
    opened = ProtocolModels({})
    opened.open(PROTOCOL)
    return opened


def policy() -> Policy:
    """The demo policy's rules on images. A rate's bound is what so many pairs can't exclude if all of them agree.

    With it, a single weapon that came back or object that was lost is one too many.
    """
    bundled, groups = load_policy("demo"), [case.group for case in cases(0)]
    rules: list[BaseRule] = []
    for rule in bundled.rules:
        metric = metric_of(getattr(rule, "measure", ""))
        if metric in RATES:
            agreeing = tango(0, 0, groups.count(RATES[metric]))[1]
            rules.append(rule.model_copy(update={"min_n": 2, "bound": Bound(upper=Limit(value=agreeing + 1e-9))}))
        elif metric in MEASURES:
            rules.append(rule.model_copy(update={"min_n": 2}))
    assert len(rules) == len(MEASURES) + len(RATES)
    return bundled.model_copy(update={"rules": tuple(rules)})


def cases(seed: int) -> list[Case]:
    drawn = CHOICE.cases(CHOICE.all_cases())
    return [Case(one.id, one.prompt, one.seed + seed, one.guidance_scale, one.group, one.label) for one in drawn]


@pytest.fixture(scope="module")
def torch_images(weapons: Edit, tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], dict[str, RunImages]]:
    """The unedited and the edited model's images of a set of seeds, made once."""
    made: dict[int, dict[str, RunImages]] = {}
    folder = tmp_path_factory.mktemp("torch")

    def of(seed: int) -> dict[str, RunImages]:
        if seed not in made:
            made[seed] = {
                name: drawn(TorchRuntime(load_pipeline(MODEL, edit), name=name), name, seed, folder / str(seed))
                for name, edit in (("base", None), ("reference", weapons))
            }
        return made[seed]

    return of


def drawn(runtime: Runtime, name: str, seed: int, folder: Path) -> RunImages:
    chosen = cases(seed)
    made = generate(folder, name, chosen, runtime, GenerationSettings(STEPS), batch_size=BATCH, progress=False)
    pictures = Pictures([made.files[case.id] for case in chosen])
    return RunImages(name, chosen, pictures, folder / "seen" / name, progress=False)


def judged(
    served: RunImages, images: dict[str, RunImages], models: ProtocolModels
) -> tuple[ProtocolRecord, GateResult]:
    every = [*images.values(), served]
    specs = [parse_runtime(f"{one.name}=onnx:{one.name}") for one in every]
    made = record(
        PROTOCOL,
        CHOICE.settings(),
        (),
        specs,
        {spec.name: Provenance() for spec in specs},
        every,
        Roles("base", "reference"),
        models,
        CHOICE.all_cases(),
        Path(os.path.commonpath([file for one in every for file in one.pictures.files])),
    )
    return made, decide(Evaluation(protocols=(made,)), policy())


def note(kind: str, name: str, outcome: str, relative: float | None) -> None:
    """A line for docs/gate.md."""
    if file := os.environ.get("EXCISE_GATE_TABLE"):
        with Path(file).open("a") as stream:
            stream.write(f"{kind}|{name}|{'' if relative is None else f'{relative:.2g}'}|{outcome}\n")


def relative(made: ProtocolRecord) -> float:
    comparison = made.comparison("reference", "served")
    assert comparison is not None
    value = comparison.measures["relative_to_edit"].value
    assert value is not None
    return value


FIRST = (SEEDS[0], "two threads"), (SEEDS[1], "edit given at load")


@pytest.mark.parametrize(
    ("seed", "name"),
    [
        pytest.param(seed, name, marks=() if (seed, name) in FIRST else pytest.mark.slow)
        for seed in SEEDS
        for name in RIGHT
    ],
)
def test_a_right_artefact_passes(
    seed: int,
    name: str,
    workshop: Workshop,
    torch_images: Callable[[int], dict[str, RunImages]],
    models: ProtocolModels,
    tmp_path: Path,
) -> None:
    served = drawn(RIGHT[name](workshop), "served", seed, tmp_path)
    made, result = judged(served, torch_images(seed), models)
    note("right", f"{name}, seeds from {seed}", "passed" if result.passed else "REJECTED", relative(made))
    assert result.passed, [check.sentence for check in result.checks if check.status == "failed"]


@pytest.mark.parametrize("name", [pytest.param(name, marks=() if name in FEW else pytest.mark.slow) for name in WRONG])
def test_a_wrong_artefact_fails(
    name: str,
    workshop: Workshop,
    torch_images: Callable[[int], dict[str, RunImages]],
    models: ProtocolModels,
    tmp_path: Path,
) -> None:
    runtime = WRONG[name](workshop)
    try:
        served = drawn(runtime, "served", 0, tmp_path)
    except ArtefactError as refused:
        if name != "half-precision overflow":
            raise
        note("wrong", name, f"no image: {str(refused).rpartition(': ')[2]}", None)
        return
    made, result = judged(served, torch_images(0), models)
    failed = [check.rule for check in result.checks if check.status == "failed"]
    note("wrong", name, "; ".join(failed) or "NOT CAUGHT", relative(made))
    assert failed, f"passes at {relative(made):.2g} of the edit"


def test_the_rates_bounds_are_the_least_that_can_be_met() -> None:
    for pairs in (6, 10):
        agreeing, lost = tango(0, 0, pairs)[1], tango(1, 0, pairs)[1]
        assert agreeing < lost
        assert tango(1, 1, pairs)[1] > agreeing
    rates = [rule for rule in policy().rules if metric_of(getattr(rule, "measure", "")) in RATES]
    assert [round(rule.bound.limit.value, 3) for rule in rates] == [0.39, 0.278]  # type: ignore[union-attr]


def test_there_are_enough_of_them() -> None:
    assert len(RIGHT) * len(SEEDS) >= 20
    assert len(WRONG) >= 30
    assert set(FEW) <= set(WRONG)
