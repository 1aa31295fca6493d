"""Runs protocols on runtimes: images, what is seen in them, figures, and the document of all.

A run goes on where it was ended, and the document doesn't tell: it holds no times. ``timings.json`` beside it does.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from excise.errors import UsageError
from excise.eval.cases import Case
from excise.eval.evaluation import Evaluation, ProtocolRecord, Provenance
from excise.eval.evaluation_report import write_anew
from excise.eval.image_file import ImageFormat
from excise.eval.image_generation import Generated, GenerationSettings, generate
from excise.eval.observation_cache import Pictures
from excise.eval.protocol_comparisons import Roles
from excise.eval.protocol_file import ProtocolFile
from excise.eval.protocol_models import ProtocolModels
from excise.eval.protocol_record import record
from excise.eval.protocol_sample import limit, sample
from excise.eval.ray_generation import generate_on_ray
from excise.eval.run_folder import ProtocolEntry, RunConfiguration, RuntimeEntry, open_run, run_versions
from excise.eval.run_images import RunImages
from excise.eval.runtime_spec import RuntimeSpec
from excise.eval.runtimes import check_runtime, open_runtime, provenance
from excise.eval.verification_sides import SCHEDULER, LoadPipeline
from excise.serve.schedulers import read_scheduler_config

TIMINGS = "timings.json"
#: What networks saw, beside a protocol's images.
SEEN = "seen"


@dataclass(frozen=True)
class Choice:
    """One protocol with what the user chose of it."""

    protocol: ProtocolFile
    prompts: Path | None = None
    parameters: Mapping[str, str] = field(default_factory=dict)
    limit: int | None = None
    sample: int | None = None
    sample_seed: int = 0
    num_inference_steps: int | None = None
    #: Take each model's own scheduler, whatever the protocol names.
    own_scheduler: bool = False

    def all_cases(self) -> tuple[Case, ...]:
        """Every case of the protocol.

        Raises:
            UsageError: the prompts can't be read, or a parameter is missing or unknown.
        """
        return self.protocol.cases(self.prompts, self.parameters)

    def cases(self, everything: Sequence[Case]) -> tuple[Case, ...]:
        """Those that are run: a sample, and the first of it."""
        chosen = tuple(everything)
        if self.sample is not None:
            chosen = sample(chosen, self.sample, self.sample_seed)
        return chosen if self.limit is None else limit(chosen, self.limit)

    @property
    def steps(self) -> int:
        """Denoising steps."""
        return self.num_inference_steps or self.protocol.sampling.num_inference_steps

    def settings(self) -> dict[str, Any]:
        """All that the figures depend on, as run."""
        document = self.protocol.settings(self.parameters)
        document["sampling"]["num_inference_steps"] = self.steps
        if self.own_scheduler:
            document["sampling"]["scheduler"] = "each model's own"
        chosen = {"limit": self.limit, "sample": self.sample}
        document["chosen"] = {name: value for name, value in chosen.items() if value is not None}
        if self.sample is not None:
            document["chosen"]["sample_seed"] = self.sample_seed
        return document


@dataclass(frozen=True)
class Run:
    """How a run is done, besides what it measures."""

    folder: Path
    specs: Sequence[RuntimeSpec]
    roles: Roles
    models: ProtocolModels
    load_pipeline: LoadPipeline
    batch_size: int = 8
    image_format: ImageFormat = "png"
    ray: bool = False
    progress: bool = True
    say: Callable[[str], None] = lambda message: None


def evaluate(choices: Sequence[Choice], run: Run) -> Evaluation:
    """Run every protocol on every runtime; ``run.folder`` holds the images and what was seen.

    Raises:
        UsageError: two protocols of one name, a role that no runtime has, another scheduler than the protocol's, or a
            model that no place is known of: all before anything is loaded.
        OutputError: the folder belongs to another run, is in use, or can't be written.
        ArtefactError, ModelError, EditError, MissingExtra: of runtimes and models.
    """
    names = [choice.protocol.name for choice in choices]
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise UsageError(f"protocol {repeated[0]} is named twice")
    run.roles.check([spec.name for spec in run.specs])
    for spec in run.specs:
        check_runtime(spec)
    for choice in choices:
        run.models.check(choice.protocol)
        for spec in run.specs:
            _check_scheduler(choice, spec)
    everything = {choice.protocol.name: choice.all_cases() for choice in choices}
    cases = {choice.protocol.name: choice.cases(everything[choice.protocol.name]) for choice in choices}
    run.say("hashing what each runtime serves")
    served = {spec.name: provenance(spec) for spec in run.specs}
    configuration = RunConfiguration(
        protocols={
            choice.protocol.name: ProtocolEntry.of(
                choice.protocol.version, choice.settings(), cases[choice.protocol.name]
            )
            for choice in choices
        },
        runtimes={
            spec.name: RuntimeEntry(source=str(spec), edit=served[spec.name].edit, manifest=served[spec.name].manifest)
            for spec in run.specs
        },
        batch_size=run.batch_size,
        image_format=run.image_format,
    )
    with open_run(run.folder, configuration):
        made = {
            spec.name: {
                choice.protocol.name: generated
                for choice, generated in _generate(choices, cases, run, spec, served[spec.name])
            }
            for spec in run.specs
        }
        _keep_timings(run.folder, made)
        records = [
            _measured(choice, run, cases[choice.protocol.name], everything[choice.protocol.name], made, served)
            for choice in choices
        ]
    return Evaluation(
        versions=run_versions(),
        machine=f"{platform.machine()}, {platform.system()}",
        protocols=tuple(records),
    )


def _check_scheduler(choice: Choice, spec: RuntimeSpec) -> None:
    wanted = choice.protocol.sampling.scheduler
    if wanted is None or choice.own_scheduler or spec.kind not in ("torch", "onnx"):
        return
    own = read_scheduler_config(Path(spec.place) / SCHEDULER)["_class_name"]
    if own != wanted:
        raise UsageError(
            f"{choice.protocol.name} samples with {wanted}, and {spec.place} with {own}: put the protocol's scheduler "
            "into its folder, or give --scheduler own, which the report will name"
        )


def _generate(
    choices: Sequence[Choice], cases: Mapping[str, Sequence[Case]], run: Run, spec: RuntimeSpec, served: Provenance
) -> list[tuple[Choice, Generated]]:
    """One runtime's images of all protocols: it is loaded once."""
    runtime = None
    done = []
    for choice in choices:
        name = choice.protocol.name
        settings = GenerationSettings(
            num_inference_steps=choice.steps,
            edit_id=served.edit,
            depends_on={"source": str(spec), "manifest": served.manifest, "versions": run_versions()},
            image_format=run.image_format,
        )
        folder = run.folder / name
        if run.ray:
            made = generate_on_ray(
                folder, spec, cases[name], run.load_pipeline, settings, batch_size=run.batch_size, progress=run.progress
            )
        else:
            if runtime is None:
                run.say(f"loading {spec.name}: {spec}")
                runtime = open_runtime(spec, run.load_pipeline)
            made = generate(
                folder, spec.name, cases[name], runtime, settings, batch_size=run.batch_size, progress=run.progress
            )
        if made.damaged:
            run.say(f"{name}, {spec.name}: {len(made.damaged)} damaged images were made again")
        done.append((choice, made))
    return done


def _measured(
    choice: Choice,
    run: Run,
    cases: Sequence[Case],
    everything: Sequence[Case],
    made: Mapping[str, Mapping[str, Generated]],
    served: Mapping[str, Provenance],
) -> ProtocolRecord:
    name = choice.protocol.name
    images = [
        RunImages(
            spec.name,
            cases,
            Pictures([made[spec.name][name].files[case.id] for case in cases]),
            run.folder / name / SEEN / spec.name,
            run.progress,
        )
        for spec in run.specs
    ]
    run.say(f"measuring {name}")
    return record(
        choice.protocol,
        choice.settings(),
        choice.protocol.figures(choice.parameters),
        run.specs,
        served,
        images,
        run.roles,
        run.models,
        everything,
        run.folder,
    )


def _keep_timings(folder: Path, made: Mapping[str, Mapping[str, Generated]]) -> None:
    """Seconds an image, of those that this start made: it isn't in the report, which a resumed run must equal."""
    document = {
        runtime: {
            protocol: {"seconds_per_image": one.seconds_per_image, "images": one.computed}
            for protocol, one in by_protocol.items()
            if one.computed
        }
        for runtime, by_protocol in made.items()
    }
    if any(document.values()):
        write_anew(folder / TIMINGS, (json.dumps(document, indent=1) + "\n").encode())
