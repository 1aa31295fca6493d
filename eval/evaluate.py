"""Runs protocols on runtimes: images, what is seen in them, figures, and the document of all.

A run goes on where it was ended, and the document doesn't tell: it holds no times. ``timings.json`` beside it does.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from excise.errors import UsageError
from excise.eval.cases import Case
from excise.eval.evaluation import Evaluation, ProtocolRecord, Provenance
from excise.eval.evaluation_report import write_anew
from excise.eval.image_file import ImageFormat, image_size
from excise.eval.image_generation import Generated, GenerationSettings, generate
from excise.eval.late_runtime import LateRuntime
from excise.eval.observation_cache import Pictures
from excise.eval.protocol_choice import Choice
from excise.eval.protocol_comparisons import Roles
from excise.eval.protocol_models import ProtocolModels
from excise.eval.protocol_record import record
from excise.eval.protocol_sizes import check_sizes, sizes_in_words
from excise.eval.ray_generation import generate_on_ray
from excise.eval.run_folder import ProtocolEntry, RunConfiguration, RuntimeEntry, open_run, run_versions
from excise.eval.run_images import RunImages
from excise.eval.runtime_spec import RuntimeSpec
from excise.eval.runtimes import check_runtime, open_runtime, provenance
from excise.eval.verification_sides import LoadPipeline

TIMINGS = "timings.json"
#: What networks saw, beside a protocol's images.
SEEN = "seen"


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
    #: Runtime → seconds that its edit took to make, as its user measured them: an edit file holds no times.
    edit_seconds: Mapping[str, float] = field(default_factory=dict)
    say: Callable[[str], None] = lambda message: None


def evaluate(choices: Sequence[Choice], run: Run) -> Evaluation:
    """Run every protocol on every runtime; ``run.folder`` holds the images and what was seen.

    Raises:
        UsageError: no runtime, two of one name or two protocols of one name, a role that no runtime has, another
            scheduler than the protocol's, a size that a runtime can't be asked for, a model that no place is known of,
            or a rule that could never count: all before any image is made.
        OutputError: the folder belongs to another run, is in use, or can't be written.
        ArtefactError, ModelError, EditError, MissingExtra: of runtimes and models.
    """
    names = [choice.protocol.name for choice in choices]
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise UsageError(f"protocol {repeated[0]} is named twice")
    if not choices or not run.specs:
        raise UsageError(f"there is nothing to run: {len(choices)} protocols on {len(run.specs)} runtimes")
    run.roles.check([spec.name for spec in run.specs])
    for spec in run.specs:
        check_runtime(spec)
    run.models.check([choice.protocol for choice in choices])
    for choice in choices:
        for spec in run.specs:
            choice.check_scheduler(spec)
    everything = {choice.protocol.name: choice.all_cases() for choice in choices}
    cases = {choice.protocol.name: choice.cases(everything[choice.protocol.name]) for choice in choices}
    for choice in choices:
        _check_sizes(choice, everything[choice.protocol.name], cases[choice.protocol.name], run)
    run.say("opening the networks that judge")
    networks = {choice.protocol.name: run.models.open(choice.protocol) for choice in choices}
    for choice in choices:
        choice.check_rules(run.models, everything[choice.protocol.name])
    run.say("hashing what each runtime serves")
    served = {spec.name: provenance(spec) for spec in run.specs}
    configuration = RunConfiguration(
        protocols={
            choice.protocol.name: ProtocolEntry.of(
                choice.protocol.version, choice.settings(), cases[choice.protocol.name]
            )
            for choice in choices
        },
        runtimes={spec.name: RuntimeEntry.of(str(spec), served[spec.name]) for spec in run.specs},
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
            _measured(
                choice,
                run,
                cases[choice.protocol.name],
                everything[choice.protocol.name],
                {name: by_protocol[choice.protocol.name] for name, by_protocol in made.items()},
                served,
                networks[choice.protocol.name],
            )
            for choice in choices
        ]
    return Evaluation(
        versions=run_versions(),
        machine=f"{platform.machine()}, {platform.system()}",
        protocols=tuple(records),
    )


def _check_sizes(choice: Choice, everything: Sequence[Case], cases: Sequence[Case], run: Run) -> None:
    """Whether every runtime can make images of the sizes that the prompts ask for; or a line that says they aren't."""
    for spec in run.specs:
        check_sizes(choice.protocol.name, cases, spec)
    chosen = {case.id for case in cases}
    if choice.own_size and (asked := [one.size for one in everything if one.size and one.id in chosen]):
        run.say(
            f"{choice.protocol.name}: images of {sizes_in_words(asked)} pixels are asked for, and all are made in each "
            "model's own size"
        )


def _generate(
    choices: Sequence[Choice], cases: Mapping[str, Sequence[Case]], run: Run, spec: RuntimeSpec, served: Provenance
) -> list[tuple[Choice, Generated]]:
    """One runtime's images of all protocols: it is loaded once."""
    runtime = LateRuntime(spec, lambda one: open_runtime(one, run.load_pipeline), run.say)
    done = []
    for choice in choices:
        name = choice.protocol.name
        settings = GenerationSettings(
            num_inference_steps=choice.steps,
            edit_id=served.edit,
            depends_on=RuntimeEntry.of(str(spec), served).depends_on(run_versions()),
            image_format=run.image_format,
        )
        folder = run.folder / name
        if run.ray:
            made = generate_on_ray(
                folder, spec, cases[name], run.load_pipeline, settings, batch_size=run.batch_size, progress=run.progress
            )
        else:
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
    made: Mapping[str, Generated],
    served: Mapping[str, Provenance],
    networks: Mapping[str, Mapping[str, str]],
) -> ProtocolRecord:
    """One protocol's record, of the images that were ``made`` by each runtime."""
    name, settings = choice.protocol.name, choice.settings()
    sizes = {spec.name: [image_size(made[spec.name].files[case.id]) for case in cases] for spec in run.specs}
    sampling = choice.protocol.sampling
    for runtime, made_sizes in sizes.items():
        height, width = next((size for case, size in zip(cases, made_sizes, strict=True) if not case.size), (0, 0))
        if height and (sampling.width or width, sampling.height or height) != (width, height):
            asked = f"{sampling.width} x {sampling.height}"
            run.say(f"{name} is of images of {asked} pixels, and those of {runtime} have {width} x {height}")
    images = [
        RunImages(
            spec.name,
            cases,
            Pictures([made[spec.name].files[case.id] for case in cases]),
            run.folder / name / SEEN / spec.name,
            run.progress,
        )
        for spec in run.specs
    ]
    run.say(f"measuring {name}")
    return record(
        choice.protocol,
        {
            **settings,
            "networks": networks,
            "image_sizes": {runtime: sizes_in_words(made_sizes) for runtime, made_sizes in sizes.items()},
        },
        choice.protocol.figures(choice.parameters),
        run.specs,
        served,
        images,
        run.roles,
        run.models,
        everything,
        run.folder,
        run.edit_seconds,
        choice.sweep,
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
