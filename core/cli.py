"""The command line: results on stdout, progress on stderr; a room is imported only by the command that needs it."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

import click

from excise import __version__
from excise.cli_attack import attack
from excise.cli_bank import bank, fuse
from excise.cli_edit import apply, edit, import_checkpoint, stack, sweep
from excise.cli_engine import engines
from excise.cli_eval import evaluate
from excise.cli_export import export, patch
from excise.cli_gate import gate
from excise.cli_refit import refit
from excise.cli_serve import serve
from excise.cli_verify import verify
from excise.console import json_option, needs, result, say
from excise.errors import ExciseError


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="excise")
def cli() -> None:
    """Erase concepts from text-to-image diffusion models, ship them, and prove it on what is served.

    \b
    Examples:
      excise demo                                    the whole loop on the bundled model
      excise edit SD_FOLDER --preset nudity --out nudity.safetensors
      excise export SD_FOLDER --edit nudity.safetensors --out sd-onnx
      excise patch sd-onnx --edit another.safetensors
      excise verify "SD_FOLDER?edit=nudity.safetensors" sd-onnx --base SD_FOLDER
      excise eval i2p-nudity --prompts i2p.csv --runtime served=onnx:sd-onnx --out evaluation
      excise gate evaluation --policy release.yaml
      excise attack closed-form --model demo:model --edit e.safetensors --protocol demo-weapons --out attacked
      excise serve run demo
      excise inspect sd-onnx
    """


@cli.command()
@click.option("--out", type=click.Path(path_type=Path), default=Path("excise-demo"), show_default=True)
@click.option(
    "--onnx",
    type=click.Path(path_type=Path, file_okay=False),
    help="Judge this exported folder in place of the edited model's own export.",
)
@json_option
def demo(out: Path, onnx: Path | None, as_json: bool) -> None:
    """Edit, export, generate and judge the bundled model; exit 0 only if every check passes.

    Erases weapons from a small text-to-image model of emoji, exports it to ONNX, and compares three runtimes on the
    same prompts and seeds. Writes edit.safetensors, onnx/, report.json, report.html and grid.png to the output folder.

    \b
    Examples:
      excise demo
      excise demo --out first-light --json
    """
    with needs("export,eval"):
        from excise.demo.run import run_demo
    outcome = run_demo(out, onnx=onnx, say=say)
    result(outcome.document, outcome.text, as_json)
    if not outcome.passed:
        sys.exit(1)


@cli.command()
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--base", metavar="MODEL", help="Tell what PATH (a model folder or a checkpoint) changes of MODEL.")
@json_option
def inspect(path: Path, base: str | None, as_json: bool) -> None:
    """Say what PATH holds: an edit file, a folder that excise exported, or a Triton repository (their files are
    checked).

    With --base, PATH is an edited diffusers folder or denoiser checkpoint: which weights differ from MODEL's, and
    whether the difference is one right-multiplication that all layers share, as the closed forms leave.

    \b
    Examples:
      excise inspect nudity.safetensors
      excise inspect sd-onnx --json
      excise inspect models
      excise inspect esd-nudity.pt --base CompVis/stable-diffusion-v1-4
    """
    if base is not None:
        with needs():
            from excise.edit.imported import difference
            from excise.edit.model_folder import resolve
        moved = difference(path, resolve(base))
        document = {"kind": "difference", "path": str(path), "base": base, **moved.document}
        result(document, "\n".join([f"{path} against {base}", *(f"  {line}" for line in moved.report)]), as_json)
        return
    if (path / "repository.json").is_file() and not (path / "excise.json").exists():
        from excise.cli_inspect_repository import inspect_repository as inspect_path
    else:
        from excise.inspection import inspect_path
    document, text, sound = inspect_path(path)
    result(document, text, as_json)
    if not sound:
        sys.exit(1)


for _command in (
    edit,
    apply,
    stack,
    import_checkpoint,
    sweep,
    export,
    patch,
    refit,
    bank,
    fuse,
    engines,
    verify,
    evaluate,
    attack,
    gate,
    serve,
):
    cli.add_command(_command)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; the exit status is 0, 1 (a check failed), 2 (usage or unreadable input) or 130 (Ctrl-C)."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        cli.main(args=None if arguments is None else list(arguments), prog_name="excise", standalone_mode=False)
    except click.exceptions.Exit as stop:
        return stop.exit_code
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except (click.Abort, KeyboardInterrupt):
        say("interrupted; nothing half-written was left")
        return 130
    except ExciseError as error:
        click.echo(f"excise: error: {error}", err=True)
        return 2
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0
