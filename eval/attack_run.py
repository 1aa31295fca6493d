"""Runs attacks on an edited model, case by case: who needs none, what the others find, and how often it succeeds.

1. *Base*: the unedited model's images of the cases whose concept was erased. Where it doesn't show the concept, an
   attack couldn't bring it back; a detector that never fires is refused.
2. *Pre*: the attacked model's images of the same prompts. What shows the concept needs no attack, and isn't attacked.
3. *Post*: every other case is attacked; what was found is judged by the same detector, rule and threshold.

A run that was ended goes on at the case that it was at. Each case's search has its own seed, so that what is found
doesn't depend on where that was.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from excise.errors import ArtefactError, ExciseError, UsageError
from excise.eval.attack import Candidate, Found, Judgement
from excise.eval.attack_cases import CaseAttacks, FoundImages, case_seed, embedded
from excise.eval.attack_found import EMBEDDINGS, PRE, FoundFile
from excise.eval.attack_found import NAME as FOUND
from excise.eval.attack_judge import ImageJudge, RuntimeJudge
from excise.eval.attack_report import (
    AttackedCase,
    AttackReport,
    AttackResult,
    Judged,
    Target,
    machine,
    share,
    succeeded,
)
from excise.eval.attack_session import AttackPlan, Session
from excise.eval.cases import ERASED, Case
from excise.eval.evaluate import SEEN
from excise.eval.evaluation import Provenance
from excise.eval.image_file import ImageFormat
from excise.eval.image_generation import IMAGES, Generated, GenerationSettings, generate
from excise.eval.late_runtime import LateRuntime
from excise.eval.observation_cache import Pictures
from excise.eval.protocol_choice import Choice
from excise.eval.protocol_models import ProtocolModels
from excise.eval.run_folder import ProtocolEntry, RunConfiguration, RuntimeEntry, open_run, run_versions
from excise.eval.run_images import RunImages, look
from excise.eval.runtime_spec import RuntimeSpec
from excise.eval.runtimes import check_runtime, open_runtime, provenance
from excise.eval.verification_sides import LoadPipeline
from excise.serve.runtime import Runtime

#: Roles, and the folders of their images.
BASE, ATTACKED = "base", "attacked"


@dataclass(frozen=True)
class AttackRun:
    """How attacks are run.

    Attributes:
        folder: found.jsonl, report.json, images; one that was begun is gone on with.
        choice: the protocol, without metrics, and what was chosen of it; samples and limits are of the erased cases.
        base: the unedited model; one with the source of ``attacked`` is the same model, which isn't run twice.
        attacked: the model that is attacked.
        seed: each case's own is derived from it.
        base_must_show: leave out cases that the unedited model doesn't show.
        open: a runtime, loaded; None opens as ``runtimes.open_runtime``.
        versions: of the packages that images depend on.
    """

    folder: Path
    choice: Choice
    base: RuntimeSpec
    attacked: RuntimeSpec
    plan: AttackPlan
    models: ProtocolModels
    load_pipeline: LoadPipeline
    seed: int = 0
    base_must_show: bool = True
    batch_size: int = 8
    image_format: ImageFormat = "png"
    progress: bool = True
    say: Callable[[str], None] = lambda message: None
    open: Callable[[RuntimeSpec], Runtime] | None = None
    versions: Mapping[str, str] = field(default_factory=run_versions)

    def late(self, spec: RuntimeSpec) -> LateRuntime:
        """A runtime that is opened for its first image."""
        return LateRuntime(spec, self.open or (lambda one: open_runtime(one, self.load_pipeline)), self.say)


def run_attacks(run: AttackRun) -> AttackReport:
    """Run every attack of the plan; ``run.folder`` holds what was found.

    Raises:
        UsageError: no case of what was erased, a rule that could never count, a model that no place is known of,
            another scheduler than the protocol's, or a detector that finds the concept in no image of the base.
        OutputError: the folder belongs to another run, is in use, or can't be written.
        ArtefactError, ModelError, EditError, MissingExtra: of runtimes and models.
        ExciseError: the memory is full; the same command goes on.
    """
    choice, protocol = run.choice, run.choice.protocol
    everything = choice.all_cases()
    erased = choice.cases([case for case in everything if case.group == ERASED])
    if not erased:
        raise UsageError(f"{protocol.name} has no prompt of what was erased: there is nothing to attack")
    for spec in (run.base, run.attacked):
        check_runtime(spec)
        choice.check_scheduler(spec)
    run.models.check([protocol])
    run.say("opening the networks that judge")
    networks = run.models.open(protocol)
    choice.check_rules(run.models, everything)
    served = {role: provenance(spec) for role, spec in ((BASE, run.base), (ATTACKED, run.attacked))}
    judged = Judged(
        protocol=protocol.name,
        version=protocol.version,
        title=protocol.title,
        rule=protocol.rules[0].measures()[0] if protocol.rules else "",
        settings={**choice.settings(), "networks": networks},
    )
    look_at = ImageJudge(protocol, run.models, everything)
    attack = {"names": list(run.plan.names), **run.plan.settings}
    settings = {**judged.settings, "attack": attack, "seed": run.seed, "base_must_show": run.base_must_show}
    configuration = RunConfiguration(
        protocols={protocol.name: ProtocolEntry.of(protocol.version, settings, erased)},
        runtimes={
            role: RuntimeEntry.of(str(spec), served[role])
            for role, spec in ((BASE, run.base), (ATTACKED, run.attacked))
        },
        batch_size=run.batch_size,
        image_format=run.image_format,
        versions=dict(run.versions),
    )
    with open_run(run.folder, configuration), out_of_memory(run.folder):
        session = Session(run.late(run.base), run.late(run.attacked), choice.steps, run.models)
        made = _images(run, session.base, BASE, erased, served[BASE])
        session.targets = made.files
        session.base.close()
        shown = _judged(run, look_at, BASE, erased, made, everything)
        cases = _chosen(run, erased, shown)
        if str(run.base) == str(run.attacked):
            own = shown
        else:
            made = _images(run, session.attacked, ATTACKED, cases, served[ATTACKED])
            own = _judged(run, look_at, ATTACKED, cases, made, everything)
        found = _attacked(run, session, look_at, cases, own, served[ATTACKED])
    by_attack = {name: [one for one in found if one.attack == name] for name in run.plan.names}
    pre = sum(own[case.id].success for case in cases)
    outcomes = {(one.case, name): succeeded(one) for name, lines in by_attack.items() for one in lines}
    return AttackReport(
        versions=dict(run.versions),
        machine=machine(),
        judged=judged,
        attack=attack,
        seed=run.seed,
        base=Target(name=BASE, source=str(run.base), provenance=served[BASE]),
        attacked=Target(name=ATTACKED, source=str(run.attacked), provenance=served[ATTACKED]),
        erased_cases=len(erased),
        base_shows=share(sum(one.success for one in shown.values()), len(erased)),
        base_must_show=run.base_must_show,
        left_out=tuple(sorted(set(shown) - {case.id for case in cases})),
        results=tuple(AttackResult.of(name, pre, lines) for name, lines in by_attack.items()),
        cases=tuple(
            AttackedCase(
                id=case.id,
                prompt=case.prompt,
                seed=case.seed,
                label=case.label,
                base=shown[case.id].success,
                pre=own[case.id].success,
                outcomes={name: outcomes[case.id, name] for name in run.plan.names if (case.id, name) in outcomes},
            )
            for case in cases
        ),
    )


@contextmanager
def out_of_memory(folder: Path) -> Iterator[None]:
    """Turn a full memory, the machine's or a GPU's, into one line that says how to go on."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        # torch.OutOfMemoryError is a RuntimeError, and so is what PyTorch's allocator on the CPU raises.
        full = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
        if not full and "can't allocate memory" not in str(error):
            raise
        raise ExciseError(
            f"the memory is full; all that was done is in {folder}: free some memory, then start the same command "
            "again, and it goes on at the case that it was at"
        ) from error


def _images(run: AttackRun, runtime: Runtime, role: str, cases: Sequence[Case], served: Provenance) -> Generated:
    """The images of the cases' own prompts."""
    spec = run.base if role == BASE else run.attacked
    return generate(
        run.folder, role, cases, runtime, _settings(run, spec, served), batch_size=run.batch_size, progress=run.progress
    )


def _settings(run: AttackRun, spec: RuntimeSpec, served: Provenance) -> GenerationSettings:
    return GenerationSettings(
        num_inference_steps=run.choice.steps,
        edit_id=served.edit,
        depends_on=RuntimeEntry.of(str(spec), served).depends_on(run.versions),
        image_format=run.image_format,
    )


def _judged(
    run: AttackRun, judge: ImageJudge, role: str, cases: Sequence[Case], made: Generated, everything: Sequence[Case]
) -> dict[str, Judgement]:
    pictures = Pictures([made.files[case.id] for case in cases])
    images = RunImages(role, cases, pictures, run.folder / SEEN / role, run.progress)
    seen = look(images, run.choice.protocol, run.models, everything).seen
    return dict(zip((case.id for case in cases), judge.decide(cases, seen), strict=True))


def _chosen(run: AttackRun, erased: Sequence[Case], shown: Mapping[str, Judgement]) -> tuple[Case, ...]:
    """The cases that count."""
    count = sum(one.success for one in shown.values())
    if not count:
        raise UsageError(
            f"the detector finds what was erased in none of the unedited model's {len(erased)} images, so that no "
            "attack could succeed and its rate would mean nothing: check the base model, the protocol's rule, and "
            f"the images in {run.folder / IMAGES / BASE}"
        )
    run.say(f"the unedited model shows the concept in {count} of {len(erased)} cases")
    return tuple(case for case in erased if shown[case.id].success or not run.base_must_show)


def _attacked(
    run: AttackRun,
    session: Session,
    look_at: ImageJudge,
    cases: Sequence[Case],
    own: Mapping[str, Judgement],
    served: Provenance,
) -> list[Found]:
    """The lines of found.jsonl, those of earlier starts included."""
    file = FoundFile(run.folder / FOUND)
    found = file.resume()
    done = {(one.case, one.attack) for one in found}
    if strange := sorted(done - {(case.id, name) for case in cases for name in (PRE, *run.plan.names)}):
        raise ArtefactError(
            f"{file.path} has a line of {strange[0][1]} for case {strange[0][0]}, which this run hasn't"
        )
    for case in cases:
        if own[case.id].success and (case.id, PRE) not in done:
            line = Found(
                case=case.id,
                attack=PRE,
                original=case.prompt,
                candidate=Candidate(prompt=case.prompt),
                seed=case_seed(run.seed, case.id),
                stopped="pre",
                judgement=own[case.id],
            )
            file.append(line)
            found.append(line)
    resisting = [case for case in cases if not own[case.id].success]
    run.say(f"{len(cases) - len(resisting)} of {len(cases)} cases show it on the attacked model without an attack")
    left = [(name, case) for name in run.plan.names for case in resisting if (case.id, name) not in done]
    if not left:
        return found
    attacks = {one.name: one for one in run.plan.make(session)}
    if tuple(attacks) != run.plan.names:
        raise ValueError(f"the plan names {run.plan.names} and makes {tuple(attacks)}")
    loop = CaseAttacks(
        attacks=attacks,
        judge=RuntimeJudge(session.attacked.opened, look_at, run.choice.steps),
        own=own,
        embeddings=embedded(run.folder / EMBEDDINGS, attacks, resisting),
        pictures=FoundImages(run.folder / IMAGES, _settings(run, run.attacked, served), run.image_format),
        seed=run.seed,
        say=run.say,
    )
    return found + loop.run(file, left, total=len(run.plan.names) * len(resisting), progress=run.progress)
