"""The commands that make deployable artefacts of a model and its edits: ``excise export`` and ``excise patch``."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import click

from excise.cli_engine import engine_options, optional_builder
from excise.console import force_option, json_option, needs, result, say
from excise.errors import UsageError
from excise.output import PARTIAL, check_free

if TYPE_CHECKING:
    from excise.editfile import Edit
    from excise.manifest import Manifest


@click.command()
@click.argument("model")
@click.option("--edit", "edit_file", type=click.Path(path_type=Path), help="The edit to export the model with.")
@click.option(
    "--site",
    type=click.Choice(["weights", "text-encoder"]),
    default="weights",
    show_default=True,
    help="Where --edit goes: into the weights, or behind the text encoder.",
)
@click.option(
    "--bank",
    "bank_files",
    multiple=True,
    type=click.Path(path_type=Path),
    help="In place of --edit, once for each edit: requests choose.",
)
@click.option("--with-base", is_flag=True, help="With --bank: requests may choose the unedited model too.")
@click.option("--dtype", type=click.Choice(["fp32", "fp16"]), help="Of everything but the VAE, which stays in fp32.")
@click.option("--options", "options_file", type=click.Path(path_type=Path), help="Precisions, opset, shapes, as YAML.")
@engine_options
@click.option("--out", required=True, type=click.Path(path_type=Path), help="The folder to write.")
@force_option
@json_option
def export(
    model: str,
    edit_file: Path | None,
    site: str,
    bank_files: tuple[Path, ...],
    with_base: bool,
    dtype: str | None,
    options_file: Path | None,
    engine: str | None,
    engine_options: Path | None,
    out: Path,
    force: bool,
    as_json: bool,
) -> None:
    """Export MODEL to ONNX through Optimum, with the manifest excise.json.

    Takes Stable Diffusion 1, 2, XL and 3, and Flux. An edit goes into the weights; edits that are one transform of the
    text can go behind the text encoder instead, or into a bank from which each request chooses.

    \b
    Examples:
      excise export SD_FOLDER --edit nudity.safetensors --out sd-onnx
      excise export SD_FOLDER --edit nudity.safetensors --dtype fp16 --out sd-onnx-fp16
      excise export SD_FOLDER --bank nudity.safetensors --bank van-gogh.safetensors --out sd-bank
      excise export SD_FOLDER --edit nudity.safetensors --engine tensorrt-rtx --out sd-engines
    An options file (editable: all keeps what a patch by a trained edit starts from, at twice the size):
      format: 1
      dtype: fp16
      editable: all
      static: {batch: 1, height: 512, width: 512}
    """
    from excise.editfile import load_edit

    _check_together(edit_file, site, bank_files, with_base)
    check_free(out)
    build = optional_builder(engine, engine_options)
    edit = load_edit(edit_file) if edit_file else None
    bank = [load_edit(file) for file in bank_files]
    with needs():
        from excise.edit.model_folder import resolve
        from excise.export.onnx_export import export_pipeline
        from excise.export.options import load_options, make_options
    options = make_options(load_options(options_file) if options_file else None, dtype=dtype)

    def write(folder: Path, edit: Edit | None) -> Manifest:
        return export_pipeline(resolve(model), folder, edit=edit, force=force, progress=say, options=options)

    if bank or (edit and site == "text-encoder"):
        manifest = _with_text_edits(write, out, edit, bank, with_base)
    else:
        manifest = write(out, edit)
    engines = build(out) if build is not None else {}
    lines = [f"{out}", f"  {len(manifest.files)} files; edit {edit.id[:12] + ': ' + edit.summary if edit else 'none'}"]
    lines += [f"  edit {index}: {row.summary if row else 'the base'}" for index, row in enumerate(manifest.bank)]
    lines += [f"  {name}/model.engine for {entry.library} {entry.version}" for name, entry in sorted(engines.items())]
    document = {
        "onnx": str(out),
        "manifest": manifest.model_dump(mode="json"),
        "engines": {name: entry.model_dump(mode="json") for name, entry in engines.items()},
    }
    result(document, "\n".join(lines), as_json)


def _check_together(edit_file: Path | None, site: str, bank_files: tuple[Path, ...], with_base: bool) -> None:
    """Raise ``UsageError`` for options that contradict each other."""
    if edit_file and bank_files:
        raise UsageError("--edit and --bank: give one of them; a bank's edits are all given by --bank")
    if with_base and not bank_files:
        raise UsageError("--with-base is for a bank: give --bank")
    if site == "text-encoder" and not edit_file:
        raise UsageError("--site text-encoder needs --edit: name the edit that goes there")


def _with_text_edits(
    write: Callable[[Path, Edit | None], Manifest], out: Path, edit: Edit | None, bank: list[Edit], with_base: bool
) -> Manifest:
    """Export the unedited model, and put the edits of the text into that."""
    from excise.export.text_edit_folders import bank_folder, fused_folder

    out.absolute().parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=PARTIAL, dir=out.absolute().parent) as temporary:
        plain = Path(temporary) / "onnx"
        write(plain, None)
        if edit is not None:
            return fused_folder(plain, out, edit, progress=say)
        return bank_folder(plain, out, bank, with_base=with_base, progress=say)[0]


@click.command()
@click.argument("onnx_dir", type=click.Path(path_type=Path))
@click.option("--edit", "edit_file", required=True, type=click.Path(path_type=Path), help="The edit to put in.")
@click.option("--out", type=click.Path(path_type=Path), help="A new folder; by default ONNX_DIR is replaced.")
@click.option("--copy", is_flag=True, help="Copy unchanged files in place of hard links.")
@force_option
@json_option
def patch(onnx_dir: Path, edit_file: Path, out: Path | None, copy: bool, force: bool, as_json: bool) -> None:
    """Put another edit into ONNX_DIR without exporting again.

    The result is what an export with the edit would be: only the weights that an edit can move are written, from their
    unedited values, which lie beside the model. Everything else is shared by hard links. ONNX_DIR is replaced in one
    step: whatever happens, it holds the old model or the new one, whole.

    A folder that plain Optimum wrote is converted on the way (its weights are taken for the unedited ones). So is one
    that meets its first edit by training, which moves other weights than those that read the text: the denoiser's files
    are written once more, unless the folder was exported with editable: all.

    ONNX Runtime and TensorRT read hard links; the onnx package from 1.21 on refuses them: use --copy for that.

    \b
    Examples:
      excise patch sd-onnx --edit nudity.safetensors
      excise patch sd-onnx --edit van-gogh.safetensors --out sd-onnx-van-gogh
    """
    from excise.editfile import load_edit
    from excise.export.patch import patch as write_patch

    loaded = load_edit(edit_file)
    manifest = write_patch(onnx_dir, loaded, out=out, force=force, link=not copy, progress=say)
    place = onnx_dir if out is None else out
    result(
        {"onnx": str(place), "manifest": manifest.model_dump(mode="json")},
        f"{place}\n  edit {loaded.id[:12]}: {loaded.summary}; parity isn't measured by a patch",
        as_json,
    )
