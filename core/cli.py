"""The command line: results on stdout, progress on stderr; a room is imported only by the command that needs it."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from excise import __version__
from excise.errors import ExciseError, MissingExtra, UsageError

#: Library that a command needs → the extra that installs it.
EXTRAS = {
    "torch": "edit",
    "diffusers": "edit",
    "transformers": "edit",
    "huggingface_hub": "edit",
    "optimum": "export",
    "onnx": "export",
    "scipy": "eval",
    "cleanfid": "eval",
    "torchvision": "eval",
    "jinja2": "eval",
    "matplotlib": "eval",
}


@contextmanager
def needs(extras: str = "") -> Iterator[None]:
    """Around a room's import: a missing library becomes ``MissingExtra`` with the command that installs it.

    ``extras`` are the ones to name; by default the missing library's own.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        library = (error.name or "").split(".")[0]
        if library not in EXTRAS:
            raise
        raise MissingExtra(library, extras or EXTRAS[library]) from error


def say(message: str) -> None:
    """One line of progress on stderr."""
    click.echo(f"excise: {message}", err=True)


def result(document: dict[str, Any], text: str, as_json: bool) -> None:
    """A command's result on stdout: one JSON document, or text for people."""
    click.echo(json.dumps(document, indent=2, ensure_ascii=False) if as_json else text)


json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON document instead of text.")
force_option = click.option("--force", is_flag=True, help="Apply the edit although the model's fingerprint differs.")


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="excise")
def cli() -> None:
    """Erase concepts from text-to-image diffusion models, ship them, and prove it on what is served.

    \b
    Examples:
      excise demo                                    the whole loop on the bundled model
      excise edit SD_FOLDER --preset nudity --out nudity.safetensors
      excise export SD_FOLDER --edit nudity.safetensors --out sd-onnx
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
@click.argument("model")
@click.option("--erase", multiple=True, metavar="TEXT", help="A concept to erase; repeat for several.")
@click.option("--to", multiple=True, metavar="TEXT", help="What it becomes: once, or once for each --erase.")
@click.option("--keep", multiple=True, metavar="TEXT", help="A prompt to hold; repeat for several.")
@click.option(
    "--preset", "preset_name", metavar="NAME", help="Defaults: nudity, unsafe, artist, object-hard, object-easy."
)
@click.option("--method", default="rece", show_default=True, metavar="NAME", help="rece, or uce.")
@click.option("--epochs", type=int, help="RECE epochs.")
@click.option("--ridge", type=float, help="λ of RECE's eq. 8.")
@click.option("--erase-scale", type=float, default=1.0, show_default=True, help="s of the UCE stage.")
@click.option("--keep-scale", type=float, help="λ₁ of the UCE stage.")
@click.option("--regularization", type=float, help="λ₂ of the UCE stage.")
@click.option("--technique", type=click.Choice(["replace", "tensor"]), default="replace", show_default=True)
@click.option(
    "--anchor",
    type=click.Choice(["current", "original"]),
    default="current",
    show_default=True,
    help="Weights that each RECE epoch edits: the current ones (as published), or the original ones with "
    "all embeddings found so far.",
)
@click.option(
    "--rule", default="last-subject", show_default=True, metavar="NAME", help="Token rule: last-subject, or all."
)
@click.option("--out", required=True, type=click.Path(path_type=Path), help="The edit file to write.")
@json_option
def edit(
    model: str,
    erase: tuple[str, ...],
    to: tuple[str, ...],
    keep: tuple[str, ...],
    preset_name: str | None,
    method: str,
    epochs: int | None,
    ridge: float | None,
    erase_scale: float,
    keep_scale: float | None,
    regularization: float | None,
    technique: str,
    anchor: str,
    rule: str,
    out: Path,
    as_json: bool,
) -> None:
    """Erase concepts from MODEL (a diffusers folder or hub id) and write an edit file.

    Reads the text encoder and the UNet's cross-attention K and V weights only. MODEL itself is not changed.
    "demo:model" is the bundled model.

    \b
    Examples:
      excise edit demo:model --erase gun --to sunflower --keep cat --keep dog --out gun.safetensors
      excise edit CompVis/stable-diffusion-v1-4 --preset nudity --out nudity.safetensors
      excise edit SD_FOLDER --preset artist --erase "Van Gogh" --keep "Monet" --out van-gogh.safetensors
    """
    from excise.editfile import save_edit
    from excise.output import check_free

    with needs():
        from excise.edit.erase import Options
        from excise.edit.erase import erase as solve
        from excise.edit.model_folder import resolve
        from excise.edit.presets import DEFAULT, preset
    if out.suffix != ".safetensors":
        raise UsageError(f"--out {out} must end in .safetensors")
    check_free(out)
    defaults = preset(preset_name or DEFAULT)
    kept = keep or defaults.keep
    by_number = max(0.1, 1 / len(kept))
    options = Options(
        erase=erase or defaults.erase,
        to=to or (defaults.to,),
        keep=kept,
        method=method,
        preset=preset_name,
        epochs=defaults.epochs if epochs is None else epochs,
        ridge=defaults.ridge if ridge is None else ridge,
        erase_scale=erase_scale,
        keep_scale=keep_scale
        if keep_scale is not None
        else (defaults.keep_scale if defaults.keep_scale is not None else by_number),
        regularization=defaults.regularization if regularization is None else regularization,
        technique="tensor" if technique == "tensor" else "replace",
        anchor="original" if anchor == "original" else "current",
        rule=rule,
    )
    options.check()
    made = solve(resolve(model), options, progress=say)
    save_edit(out, made)
    result(
        {"edit": str(out), "id": made.id, "metadata": made.metadata.model_dump(mode="json")},
        f"{out}\n  id      {made.id}\n  {made.summary}",
        as_json,
    )


@cli.command()
@click.argument("edit_file", metavar="EDIT", type=click.Path(path_type=Path))
@click.argument("model")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="The folder to write.")
@force_option
@json_option
def apply(edit_file: Path, model: str, out: Path, force: bool, as_json: bool) -> None:
    """Apply EDIT to MODEL and write an edited diffusers pipeline; MODEL itself is not changed.

    \b
    Example:
      excise apply nudity.safetensors SD_FOLDER --out sd-safe
    """
    from excise.editfile import load_edit

    with needs():
        from excise.edit.apply import apply_edit
        from excise.edit.model_folder import resolve
    loaded = load_edit(edit_file)
    apply_edit(resolve(model), loaded, out, force=force)
    result({"model": str(out), "edit": loaded.id}, f"{out}\n  {loaded.summary}", as_json)


@cli.command()
@click.argument("model")
@click.option("--edit", "edit_file", type=click.Path(path_type=Path), help="The edit to export the model with.")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="The folder to write.")
@force_option
@json_option
def export(model: str, edit_file: Path | None, out: Path, force: bool, as_json: bool) -> None:
    """Export MODEL to ONNX (float32) through Optimum, with the manifest excise.json.

    \b
    Example:
      excise export SD_FOLDER --edit nudity.safetensors --out sd-onnx
    """
    from excise.editfile import load_edit

    with needs():
        from excise.edit.model_folder import resolve
        from excise.export.onnx_export import export_pipeline
    loaded = load_edit(edit_file) if edit_file else None
    manifest = export_pipeline(resolve(model), out, edit=loaded, force=force, progress=say)
    result(
        {"onnx": str(out), "manifest": manifest.model_dump(mode="json")},
        f"{out}\n  {len(manifest.files)} files; edit {loaded.id[:12] + ': ' + loaded.summary if loaded else 'none'}",
        as_json,
    )


@cli.command()
@click.argument("path", type=click.Path(path_type=Path))
@json_option
def inspect(path: Path, as_json: bool) -> None:
    """Say what PATH holds: an edit file, or a folder that excise exported (its files are checked).

    \b
    Examples:
      excise inspect nudity.safetensors
      excise inspect sd-onnx --json
    """
    from excise.inspection import inspect_path

    document, text, sound = inspect_path(path)
    result(document, text, as_json)
    if not sound:
        sys.exit(1)


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
