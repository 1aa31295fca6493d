"""How ``excise attack``'s commands run: the models and the protocol that were named, the report, and the replay."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from excise.cli_attack_options import parsed_pairs, warnings_said
from excise.console import needs, result, say
from excise.errors import UsageError
from excise.manifest import first_problem

if TYPE_CHECKING:
    from excise.eval.attack_report import ReplayReport
    from excise.eval.attack_session import AttackPlan
    from excise.eval.protocol_choice import Choice
    from excise.eval.protocol_models import ProtocolModels


def run_attack(
    plan: Callable[[], AttackPlan],
    *,
    model: str,
    edit: Path | None,
    base: str | None,
    seed: int,
    base_must_show: bool,
    runtimes: tuple[str, ...],
    out: Path,
    batch_size: int,
    as_json: bool,
    **chosen: Any,
) -> None:
    """What all attacks share: run, report, and replay where runtimes are named."""
    with needs("eval"):
        from excise.eval.attack_report import write_attack_report
        from excise.eval.attack_run import AttackRun, run_attacks
        from excise.eval.attack_specs import attack_specs
        from excise.eval.attack_table import attack_table, replay_table
        from excise.eval.runtime_spec import parse_runtimes
        from excise.eval.runtimes import check_runtime
        from excise.export.pipeline import load_pipeline

        planned = _planned(plan)
    choice, models = chosen_protocol(**chosen)
    unedited, attacked = attack_specs(model, edit, base, models.device)
    for spec in parse_runtimes(runtimes) if runtimes else ():
        check_runtime(spec)  # before the long part
    if str(unedited) == str(attacked):
        say("neither --edit nor --base is given: the unedited model itself is attacked")
    with warnings_said(), needs():
        report = run_attacks(
            AttackRun(
                folder=out,
                choice=choice,
                base=unedited,
                attacked=attacked,
                plan=planned,
                models=models,
                load_pipeline=load_pipeline,
                seed=seed,
                base_must_show=base_must_show,
                batch_size=batch_size,
                say=say,
            )
        )
    path = write_attack_report(out, report)
    text, document = f"{attack_table(report)}\n\n{path}", report.model_dump(mode="json")
    if runtimes:
        again = run_replay(out, runtimes, out / "replay", choice, models, batch_size)
        text, document = f"{text}\n\n{replay_table(again)}", {**document, "replay": again.model_dump(mode="json")}
    result(document, text, as_json)


def _planned(plan: Callable[[], AttackPlan]) -> AttackPlan:
    """The plan, with a setting that can't be used said on one line."""
    try:
        return plan()
    except ValidationError as error:
        raise UsageError(f"a setting of the attack can't be used: {first_problem(error)}") from error


def run_replay(
    found: Path, runtimes: tuple[str, ...], out: Path, choice: Choice, models: ProtocolModels, batch_size: int
) -> ReplayReport:
    """Replay findings, and write the report."""
    with needs("eval"):
        from excise.eval.attack_replay import Replay
        from excise.eval.attack_replay import replay as replayed
        from excise.eval.attack_report import write_attack_report
        from excise.eval.runtime_spec import parse_runtimes
        from excise.export.pipeline import load_pipeline
    with warnings_said(), needs():
        report = replayed(
            Replay(
                folder=out,
                found=found,
                choice=choice,
                specs=parse_runtimes(runtimes),
                models=models,
                load_pipeline=load_pipeline,
                batch_size=batch_size,
                say=say,
            )
        )
    write_attack_report(out, report)
    return report


def chosen_protocol(
    *,
    protocol: str,
    prompts: Path | None,
    parameters: tuple[str, ...],
    networks: tuple[str, ...],
    steps: int | None,
    scheduler: str,
    device: str,
    **fewer: Any,
) -> tuple[Choice, ProtocolModels]:
    """The protocol, without the metrics that an attack doesn't need, and where its detectors are."""
    with needs("eval"):
        from excise.eval.protocol_choice import Choice
        from excise.eval.protocol_file import load_protocol
        from excise.eval.protocol_models import ProtocolModels
    choice = Choice(
        load_protocol(protocol).model_copy(update={"metrics": ()}),
        prompts=prompts,
        parameters=parsed_pairs("--set", parameters),
        num_inference_steps=steps,
        own_scheduler=scheduler == "own",
        own_size=True,
        **fewer,
    )
    if not choice.protocol.rules:
        raise UsageError(f"{choice.protocol.name} has no counting rule: an attack's success can't be told by it")
    places = {name: Path(place) for name, place in parsed_pairs("--network", networks).items()}
    return choice, ProtocolModels(places, device, option="--network")
