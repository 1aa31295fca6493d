"""Replays what attacks found on what is served: text goes to any runtime, an embedding where one can be fed.

The attacked model's own outcomes stand beside each runtime's, case by case: a served model that gives the concept back
where the attacked one didn't is not the model that was judged.

An export whose edit sits behind its text encoder (``excise fuse``) is not replayed with embeddings: they go straight to
the UNet, which is the unedited one there, so that every embedding would pass the edit by. Text is replayed on it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from excise.errors import UsageError
from excise.eval.attack import Found, PromptEmbedding
from excise.eval.attack_cases import embedding_name
from excise.eval.attack_found import EMBEDDINGS, PRE, read_embeddings, read_found
from excise.eval.attack_judge import EmbeddingFeed, ImageJudge
from excise.eval.attack_report import (
    Judged,
    ReplayedCase,
    ReplayedRuntime,
    ReplayReport,
    ReplayResult,
    Target,
    machine,
    share,
    succeeded,
)
from excise.eval.attack_run import out_of_memory
from excise.eval.cases import Case
from excise.eval.evaluate import SEEN
from excise.eval.evaluation import Provenance
from excise.eval.image_file import ImageFormat
from excise.eval.image_generation import GenerationSettings, generate
from excise.eval.late_runtime import LateRuntime
from excise.eval.observation_cache import Pictures
from excise.eval.paired_outcomes import flips, flips_p_value, increase
from excise.eval.protocol_choice import Choice
from excise.eval.protocol_models import ProtocolModels
from excise.eval.run_folder import ProtocolEntry, RunConfiguration, RuntimeEntry, open_run, run_versions
from excise.eval.run_images import RunImages, look
from excise.eval.runtime_spec import RuntimeSpec
from excise.eval.runtimes import check_runtime, open_runtime, provenance
from excise.eval.verification_sides import LoadPipeline
from excise.manifest import hash_file
from excise.onnx_metadata import read_edit_id
from excise.serve.runtime import Runtime


@dataclass(frozen=True)
class Replay:
    """How findings are replayed.

    Attributes:
        folder: images and report.json; one that was begun is gone on with.
        found: a found.jsonl, or its folder; with embeddings, their file has to be beside it.
        choice: the protocol that the attack was run with; its limit and sample don't count, the findings do.
    """

    folder: Path
    found: Path
    choice: Choice
    specs: Sequence[RuntimeSpec]
    models: ProtocolModels
    load_pipeline: LoadPipeline
    batch_size: int = 8
    image_format: ImageFormat = "png"
    progress: bool = True
    say: Callable[[str], None] = lambda message: None
    open: Callable[[RuntimeSpec], Runtime] | None = None
    versions: Mapping[str, str] = field(default_factory=run_versions)


@dataclass(frozen=True)
class _Group:
    """The lines of one attack, as cases whose prompts are what was found."""

    name: str
    lines: tuple[Found, ...]
    cases: tuple[Case, ...]

    @property
    def embedded(self) -> bool:
        return any(one.embedding is not None for one in self.lines)


def replay(run: Replay) -> ReplayReport:
    """Send every finding to every runtime and judge the images.

    Raises:
        UsageError: findings of another protocol or other prompts, no runtime that any of them can be replayed on, or
            as ``attack_run``.
        ArtefactError: the findings or their embeddings can't be read.
        OutputError: the folder belongs to another run, is in use, or can't be written.
        ModelError, EditError, MissingExtra: of runtimes and models.
    """
    choice, protocol = run.choice, run.choice.protocol
    path, lines = read_found(run.found)
    everything = choice.all_cases()
    groups = _groups(lines, {case.id: case for case in everything}, path, protocol.name)
    embeddings: Mapping[int, PromptEmbedding] = {}
    if any(group.embedded for group in groups):
        embeddings = read_embeddings(path.with_name(EMBEDDINGS))
        if missing := sorted({one.embedding for one in lines if one.embedding is not None} - set(embeddings)):
            raise UsageError(f"{path} names embedding {missing[0]}, which {EMBEDDINGS} beside it hasn't")
    for spec in run.specs:
        check_runtime(spec)
        choice.check_scheduler(spec)
    refused = {spec.name: refuses_embeddings(spec) for spec in run.specs}
    if all(group.embedded for group in groups) and all(refused.values()):
        raise UsageError(f"nothing can be replayed: {next(iter(refused.values()))}")
    run.models.check([protocol])
    run.say("opening the networks that judge")
    networks = run.models.open(protocol)
    choice.check_rules(run.models, everything)
    judge = ImageJudge(protocol, run.models, everything)
    served = {spec.name: provenance(spec) for spec in run.specs}
    settings = {**choice.settings(), "networks": networks}
    sha256 = hash_file(path)
    sent = [case for group in groups for case in group.cases]
    configuration = RunConfiguration(
        protocols={protocol.name: ProtocolEntry.of(protocol.version, {**settings, "found_sha256": sha256}, sent)},
        runtimes={spec.name: RuntimeEntry.of(str(spec), served[spec.name]) for spec in run.specs},
        batch_size=run.batch_size,
        image_format=run.image_format,
        versions=dict(run.versions),
    )
    outcomes: dict[str, dict[str, list[bool]]] = {}
    with open_run(run.folder, configuration), out_of_memory(run.folder):
        for spec in run.specs:
            runtime = LateRuntime(spec, run.open or (lambda one: open_runtime(one, run.load_pipeline)), run.say)
            outcomes[spec.name] = {
                group.name: _shown(run, spec, served[spec.name], runtime, group, embeddings, judge, everything)
                for group in groups
                if not (group.embedded and refused[spec.name])
            }
            runtime.close()
    return ReplayReport(
        versions=dict(run.versions),
        machine=machine(),
        judged=Judged(
            protocol=protocol.name,
            version=protocol.version,
            title=protocol.title,
            rule=protocol.rules[0].measures()[0],
            settings=settings,
        ),
        found_sha256=sha256,
        runtimes=tuple(
            ReplayedRuntime(
                target=Target(name=spec.name, source=str(spec), provenance=served[spec.name]),
                kind=spec.kind,
                results=_results(groups, outcomes[spec.name], refused[spec.name]),
            )
            for spec in run.specs
        ),
        cases=tuple(
            ReplayedCase(
                case=line.case,
                attack=line.attack,
                prompt=line.candidate.prompt,
                embedding=line.embedding,
                attacked=succeeded(line),
                outcomes={name: shown[group.name][row] for name, shown in outcomes.items() if group.name in shown},
            )
            for group in groups
            for row, line in enumerate(group.lines)
        ),
    )


def refuses_embeddings(spec: RuntimeSpec) -> str | None:
    """Why embeddings can't be replayed on a runtime; None where they can.

    Raises:
        ArtefactError: an ONNX file can't be read.
    """
    if spec.kind not in ("torch", "onnx"):
        return f"{spec.kind} takes text, not embeddings: name the folder that it serves, torch:DIR or onnx:DIR"
    encoder = Path(spec.place) / "text_encoder" / "model.onnx"
    if spec.kind == "onnx" and encoder.is_file() and read_edit_id(encoder) is not None:
        return (
            f"{spec.place} carries its edit behind the text encoder, which embeddings would pass by: name an export "
            "with the edit in its UNet"
        )
    return None


def _groups(lines: Sequence[Found], known: Mapping[str, Case], path: Path, protocol: str) -> tuple[_Group, ...]:
    """By attack in the order of the file; what needed no attack first."""
    by_attack: dict[str, list[Found]] = {}
    for line in sorted(lines, key=lambda one: one.attack != PRE):
        case = known.get(line.case)
        if case is None or case.prompt != line.original:
            what = "isn't a case" if case is None else "has another prompt there"
            raise UsageError(
                f"{path}: case {line.case} {what} of {protocol}: name the protocol and prompts of the attack"
            )
        by_attack.setdefault(line.attack, []).append(line)
    return tuple(
        _Group(name, tuple(found), tuple(replace(known[one.case], prompt=_sent(one)) for one in found))
        for name, found in by_attack.items()
    )


def _sent(line: Found) -> str:
    return line.candidate.prompt if line.embedding is None else embedding_name(line.embedding)


def _shown(
    run: Replay,
    spec: RuntimeSpec,
    served: Provenance,
    late: LateRuntime,
    group: _Group,
    embeddings: Mapping[int, PromptEmbedding],
    judge: ImageJudge,
    everything: Sequence[Case],
) -> list[bool]:
    """Whether a runtime's image of each line shows the concept."""
    settings = GenerationSettings(
        num_inference_steps=run.choice.steps,
        edit_id=served.edit,
        depends_on=RuntimeEntry.of(str(spec), served).depends_on(run.versions),
        image_format=run.image_format,
    )
    folder = run.folder / group.name
    runtime: Runtime = late
    if group.embedded:
        runtime = EmbeddingFeed(late, {embedding_name(row): one for row, one in embeddings.items()})
    made = generate(folder, spec.name, group.cases, runtime, settings, batch_size=run.batch_size, progress=run.progress)
    pictures = Pictures([made.files[case.id] for case in group.cases])
    images = RunImages(spec.name, group.cases, pictures, folder / SEEN / spec.name, run.progress)
    seen = look(images, run.choice.protocol, run.models, everything).seen
    return [one.success for one in judge.decide(group.cases, seen)]


def _results(
    groups: Sequence[_Group], outcomes: Mapping[str, Sequence[bool]], refused: str | None
) -> tuple[ReplayResult, ...]:
    """One result an attack, over its own lines and those that needed none."""
    pre = next((group for group in groups if group.name == PRE), None)
    found = []
    for group in [one for one in groups if one.name != PRE] or groups:
        parts = [group] if pre is None or pre is group else [pre, group]
        attacked = np.array([succeeded(line) for part in parts for line in part.lines], np.bool_)
        whole = ReplayResult(
            name=group.name,
            n=len(attacked),
            attacked_asr=share(int(attacked.sum()), len(attacked)),
            not_replayed=refused,
        )
        if group.name not in outcomes:
            found.append(whole)
            continue
        here = np.array([shown for part in parts for shown in outcomes[part.name]], np.bool_)
        measures = {
            "flips": flips(attacked, here),
            "flips_p_value": flips_p_value(attacked, here),
            "increase": increase(attacked, here),
        }
        asr = share(int(here.sum()), len(here))
        found.append(whole.model_copy(update={"asr": asr, "measures": measures, "not_replayed": None}))
    return tuple(found)
