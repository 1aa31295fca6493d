"""The command ``excise eval``: a published evaluation on what will be served."""

from __future__ import annotations

import math
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from excise.cli_attack_options import parsed_pairs
from excise.cli_eval_sweep import swept_runtimes
from excise.cli_recipe import number
from excise.console import json_option, needs, result, say
from excise.errors import UsageError

if TYPE_CHECKING:
    from excise.eval.protocol_file import ProtocolFile

#: Not a protocol, but all of the demo's with the erasers and attacks of the paper.
DEMO_TABLE = "demo-table"

#: Names that say a runtime's role by themselves.
BASE, REFERENCE = ("base",), ("reference", "edited")

_pairs: dict[str, Any] = {"multiple": True, "metavar": "NAME=VALUE"}


@click.command("eval")
@click.argument("protocols", nargs=-1, metavar="PROTOCOL...")
@click.option("--runtime", "runtimes", multiple=True, metavar="NAME=KIND:PLACE", help="Whose images; repeat it.")
@click.option("--out", type=click.Path(path_type=Path), help="The run's folder; one that was begun is gone on with.")
@click.option("--base", metavar="NAME", help="The unedited model's runtime.  [default: the one named base]")
@click.option(
    "--reference", metavar="NAME", help="The edited model's own.  [default: the one named reference or edited]"
)
@click.option("--floor", multiple=True, metavar="NAME", help="The reference run in another way: what rounding does.")
@click.option("--prompts", type=click.Path(path_type=Path), help="The protocol's prompt file, or its folder.")
@click.option("--set", "parameters", help="A protocol's parameter, such as erased=Van Gogh.", **_pairs)
@click.option("--model", "models", help="Where a detector or metric has its weights.", **_pairs)
@click.option(
    "--sweep", metavar="NAME[=V,V,…]", help="Run one of the protocol's ablations: an edit of the base for each value."
)
@click.option("--limit", type=click.IntRange(1), metavar="N", help="The first N cases only.")
@click.option("--sample", type=click.IntRange(1), metavar="N", help="N cases, drawn in proportion from every label.")
@click.option("--sample-seed", type=click.IntRange(0), default=0, show_default=True, help="Of --sample.")
@click.option("--steps", type=click.IntRange(1), metavar="N", help="Denoising steps in place of the protocol's.")
@click.option("--scheduler", type=click.Choice(["protocol", "own"]), default="protocol", show_default=True)
@click.option(
    "--image-size",
    type=click.Choice(["protocol", "own"]),
    default="protocol",
    show_default=True,
    help="Make images as large as the prompts ask for, or as each model makes them.",
)
@click.option("--edit-seconds", "seconds", help="What making a runtime's edit took, as excise edit says.", **_pairs)
@click.option("--batch-size", type=click.IntRange(1), default=8, show_default=True, help="Images in a batch.")
@click.option("--format", "image_format", type=click.Choice(["png", "webp"]), default="png", show_default=True)
@click.option("--device", default="cpu", show_default=True, help="Of PyTorch's detectors and metrics.")
@click.option("--ray", is_flag=True, help="Spread generation over a Ray cluster, one actor a device.")
@click.option("--policy", metavar="FILE", help="Also decide, as excise gate does: exit 1 if it fails.")
@click.option("--list", "listed", is_flag=True, help="List the protocols and stop.")
@click.option(
    "--compare", nargs=2, type=click.Path(path_type=Path), metavar="A B", help="Set two reports side by side."
)
@json_option
def evaluate(
    protocols: tuple[str, ...],
    runtimes: tuple[str, ...],
    out: Path | None,
    base: str | None,
    reference: str | None,
    floor: tuple[str, ...],
    prompts: Path | None,
    parameters: tuple[str, ...],
    models: tuple[str, ...],
    sweep: str | None,
    limit: int | None,
    sample: int | None,
    sample_seed: int,
    steps: int | None,
    scheduler: str,
    image_size: str,
    seconds: tuple[str, ...],
    batch_size: int,
    image_format: Any,
    device: str,
    ray: bool,
    policy: str | None,
    listed: bool,
    compare: tuple[Path, Path] | None,
    as_json: bool,
) -> None:
    """Run published evaluations on what will be served: images, what is in them, figures with intervals, a report.

    Each --runtime is NAME=KIND:PLACE with options after a "?": torch:DIR (edit=FILE, dtype=, device=), onnx:DIR
    (provider=cpu|cuda|tensorrt, edit=FILE), triton:URL/MODEL, openai:URL. The same prompts and seeds go to all of them.

    A run that was ended goes on where it was, with the same command; its report is the same to the last byte. Prompt
    sets and weights are read from paths that you give. Nothing is downloaded but the prompts of a protocol of your own
    that names a data set of the hub, nothing leaves this machine but requests to a server that you name.

    \b
    Examples:
      excise eval --list
      excise eval demo-weapons --runtime base=torch:demo:model --runtime "edited=torch:demo:model?edit=e.safetensors"
          --runtime served=onnx:demo-onnx --out run --policy demo
      excise eval i2p-nudity --prompts i2p.csv --sample 500 --runtime served=triton:http://localhost:8000/excise
          --model clip-vit-base-patch32=clip-b32 --scheduler own --out run
      excise eval demo-weapons --sweep epochs --runtime base=torch:demo:model --out epochs
      excise eval --compare run run-2
      excise eval demo-table --out table      the paper's tables in miniature, on the bundled model: hours, resumable
      excise eval demo-table --set rows=base,uce,rece --set attacks=closed-form --set attacked=6 --sample 40 --out few
    """
    if DEMO_TABLE in protocols:
        from excise.cli_demo_table import make_demo_table

        refuse_others(
            protocols,
            runtime=runtimes,
            base=base,
            reference=reference,
            floor=floor,
            prompts=prompts,
            model=models,
            sweep=sweep,
            limit=limit,
            policy=policy,
            edit_seconds=seconds,
            compare=compare,
        )
        make_demo_table(
            out, parsed_pairs("--set", parameters), cases=sample, steps=steps, batch_size=batch_size, as_json=as_json
        )
        return
    with needs("eval"):
        from excise.eval.evaluate import Run
        from excise.eval.evaluate import evaluate as evaluated
        from excise.eval.evaluation_comparison import compare_reports, comparison_text
        from excise.eval.evaluation_report import write_evaluation
        from excise.eval.evaluation_table import table
        from excise.eval.gate import decide
        from excise.eval.policy import load_policy, refuse_unknown
        from excise.eval.protocol_choice import Choice
        from excise.eval.protocol_comparisons import Roles
        from excise.eval.protocol_file import bundled, load_protocol
        from excise.eval.protocol_models import ProtocolModels
        from excise.eval.runtime_spec import parse_runtimes
        from excise.export.pipeline import load_pipeline
    if (listed or compare is not None) and (protocols or runtimes or out is not None):
        raise UsageError(
            f"{'--list' if listed else '--compare A B'} runs nothing: leave protocols, --runtime and --out out"
        )
    if listed:
        known = bundled()
        result({"protocols": [_described(one) for one in known]}, _listing(known), as_json)
        return
    if compare is not None:
        compared = compare_reports(*compare)
        sides = (str(compare[0]), str(compare[1]))
        result(compared.model_dump(mode="json"), comparison_text(compared, sides), as_json)
        return
    given = {
        "a protocol (excise eval --list)": protocols,
        "--runtime NAME=KIND:PLACE": runtimes,
        "--out FOLDER": out is not None,
    }
    if missing := [what for what, there in given.items() if not there]:
        raise UsageError(f"{' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} missing")
    assert out is not None
    if sweep is not None and len(protocols) > 1:
        raise UsageError(f"--sweep {sweep} is one protocol's: leave {', '.join(protocols[1:])} out")
    specs = parse_runtimes(runtimes)
    names = [spec.name for spec in specs]
    rule = load_policy(policy) if policy is not None else None
    roles = Roles(base=base or _named(names, BASE), reference=reference or _named(names, REFERENCE), floor=floor)
    choices = [
        Choice(
            loaded,
            prompts=prompts,
            parameters=parsed_pairs("--set", parameters),
            limit=limit,
            sample=sample,
            sample_seed=sample_seed,
            num_inference_steps=steps,
            own_scheduler=scheduler == "own",
            own_size=image_size == "own",
            sweep=None if sweep is None else loaded.sweep(sweep),
        )
        for loaded in map(load_protocol, protocols)
    ]
    if rule is not None:
        # Found after the run, a misspelt name would cost it.
        refuse_unknown(rule, [measure for choice in choices for measure in choice.protocol.measures()])
    seconds_of = _seconds(seconds, names)
    if swept := choices[0].sweep:
        made = swept_runtimes(choices[0], swept, specs, roles.base, out)
        specs, seconds_of = (*specs, *made.specs), {**made.seconds, **seconds_of}
    run = Run(
        folder=out,
        specs=specs,
        roles=roles,
        models=ProtocolModels({name: Path(place) for name, place in parsed_pairs("--model", models).items()}, device),
        load_pipeline=load_pipeline,
        batch_size=batch_size,
        image_format=image_format,
        ray=ray,
        edit_seconds=seconds_of,
        say=say,
    )
    with warnings.catch_warnings(), needs():
        warnings.showwarning = lambda message, *rest, **options: say(str(message))
        evaluation = evaluated(choices, run)
    decided = decide(evaluation, rule) if rule is not None else None
    files = write_evaluation(out, evaluation, None if decided is None else decided.checks, replace=True)
    text = f"{table(evaluation, None if decided is None else decided.checks)}\n\n{files['report.html']}"
    document = evaluation.model_dump(mode="json")
    result(document if decided is None else {**document, "gate": decided.document()}, text, as_json)
    if decided is not None and not decided.passed:
        sys.exit(1)


def refuse_others(protocols: tuple[str, ...], **given: Any) -> None:
    """Raise ``UsageError`` for what the demo's table decides itself."""
    if len(protocols) > 1:
        raise UsageError(f"{DEMO_TABLE} is a run of its own: leave {', '.join(set(protocols) - {DEMO_TABLE})} out")
    if named := [name for name, value in given.items() if value]:
        raise UsageError(f"--{named[0].replace('_', '-')}: {DEMO_TABLE} has its own; leave it out")


def _named(names: list[str], roles: tuple[str, ...]) -> str | None:
    return next((name for name in roles if name in names), None)


def _seconds(texts: tuple[str, ...], names: list[str]) -> dict[str, float]:
    """``--edit-seconds`` by runtime."""
    found = {}
    for name, text in parsed_pairs("--edit-seconds", texts).items():
        if name not in names:
            raise UsageError(f"--edit-seconds {name}={text}: the runtimes are {', '.join(names)}")
        found[name] = number("--edit-seconds", text)
        if not 0 <= found[name] < math.inf:
            raise UsageError(f"--edit-seconds {name}={text}: give seconds, such as 3.4")
    return found


def _described(protocol: ProtocolFile) -> dict[str, Any]:
    return {
        "name": protocol.name,
        "version": protocol.version,
        "title": protocol.title,
        "prompts": protocol.prompts.model_dump(mode="json"),
        "parameters": list(protocol.parameters),
        "sweeps": {name: one.model_dump(mode="json") for name, one in protocol.sweeps.items()},
        "measures": list(protocol.measures()),
    }


def _listing(protocols: list[ProtocolFile]) -> str:
    width = max(len(protocol.name) for protocol in protocols)
    lines = []
    for protocol in protocols:
        lines.append(f"{protocol.name:<{width}}  {protocol.title}")
        needed = [f"--set {name}=..." for name in protocol.parameters]
        # A data set of the hub is fetched.
        file = getattr(protocol.prompts, "file", None) if protocol.prompts.source == "file" else None
        needed += [f"--prompts {file}"] if file else []
        lines.append(f"{'':<{width}}  {', '.join(protocol.measures())}{'; ' + ' '.join(needed) if needed else ''}")
        if protocol.sweeps:
            lines.append(f"{'':<{width}}  {' or '.join(f'--sweep {name}' for name in protocol.sweeps)}")
    return "\n".join(lines)
