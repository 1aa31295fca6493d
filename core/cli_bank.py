"""The commands for edits that act on the text: ``excise bank`` and ``excise fuse``."""

from __future__ import annotations

from pathlib import Path

import click

from excise.console import json_option, result, say

_onnx_dir = click.argument("onnx_dir", type=click.Path(path_type=Path))
_out = click.option("--out", required=True, type=click.Path(path_type=Path), help="The folder to write.")
_copy = click.option("--copy", is_flag=True, help="Copy the files that stay as they are instead of linking them.")


@click.command()
@_onnx_dir
@click.option(
    "--edit", "edit_files", multiple=True, required=True, type=click.Path(path_type=Path), help="Once for each edit."
)
@click.option("--with-base", is_flag=True, help="Let requests choose the unedited model too, by naming no edit.")
@_out
@_copy
@json_option
def bank(onnx_dir: Path, edit_files: tuple[Path, ...], with_base: bool, out: Path, copy: bool, as_json: bool) -> None:
    """Put several edits into one exported model: each request of a batch chooses its own.

    The denoiser gets one more input, edit_index. That works for edits that are one transform of the text, over every
    layer that reads it; others are refused. Without --with-base the unedited model can't be reached.

    \b
    Example:
      excise bank sd-onnx --edit nudity.safetensors --edit van-gogh.safetensors --out sd-bank
    """
    from excise.editfile import load_edit
    from excise.export.text_edit_folders import bank_folder

    edits = [load_edit(file) for file in edit_files]
    manifest, described = bank_folder(onnx_dir, out, edits, with_base=with_base, link=not copy, progress=say)
    rows = [f"  {index}  {(row.id or 'base')[:12]:<12}  {row.summary}" for index, row in enumerate(described.rows)]
    if not described.base_compared:
        rows.append("  the model's own weights are rounded and weren't compared with those that the edits are for")
    document = {
        "onnx": str(out),
        "bank": described.model_dump(mode="json"),
        "manifest": manifest.model_dump(mode="json"),
    }
    result(document, "\n".join([str(out), *rows]), as_json)


@click.command()
@_onnx_dir
@click.option("--edit", "edit_file", required=True, type=click.Path(path_type=Path), help="The edit file.")
@_out
@_copy
@json_option
def fuse(onnx_dir: Path, edit_file: Path, out: Path, copy: bool, as_json: bool) -> None:
    """Put an edit behind the text encoder of ONNX_DIR: the UNet, and any engine built of it, stay as they are.

    For Stable Diffusion 1 and 2, and edits that are one transform over every layer that reads the text.

    \b
    Example:
      excise fuse sd-onnx --edit nudity.safetensors --out sd-fused
    """
    from excise.editfile import load_edit
    from excise.export.text_edit_folders import fused_folder

    edit = load_edit(edit_file)
    manifest = fused_folder(onnx_dir, out, edit, link=not copy, progress=say)
    document = {"onnx": str(out), "manifest": manifest.model_dump(mode="json")}
    result(document, f"{out}\n  edit {edit.id[:12]}, behind the text encoder: {edit.summary}", as_json)
