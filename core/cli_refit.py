"""The command that puts another edit into a built engine."""

from __future__ import annotations

from pathlib import Path

import click

from excise.console import force_option, json_option, needs, result, say


@click.command()
@click.argument("onnx_dir", type=click.Path(path_type=Path))
@click.option("--edit", "edit_file", required=True, type=click.Path(path_type=Path), help="The edit to put in.")
@click.option(
    "--library", type=click.Choice(["tensorrt", "tensorrt-rtx"]), help="By default the one that built the engine."
)
@click.option("--out", type=click.Path(path_type=Path), help="A new folder; by default ONNX_DIR is replaced.")
@force_option
@json_option
def refit(onnx_dir: Path, edit_file: Path, library: str | None, out: Path | None, force: bool, as_json: bool) -> None:
    """Put another edit into ONNX_DIR and into its denoiser's engine, without building that again.

    ONNX_DIR has an engine that excise engines built with refit: true, on a GPU of this kind. Its ONNX files are patched
    as by excise patch, and every weight that an edit can move is replaced in the engine. The result is written only if
    the engine then computes what the patched ONNX model does, measured against how far the edit moved it. ONNX_DIR is
    replaced in one step.

    \b
    Examples:
      excise refit sd-engines --edit nudity.safetensors
      excise refit sd-engines --edit van-gogh.safetensors --out sd-engines-van-gogh
    """
    from excise.editfile import load_edit

    loaded = load_edit(edit_file)
    with needs("export"):
        from excise.export.refit import refit as refit_engine
    done = refit_engine(onnx_dir, loaded, library, out=out, force=force, progress=say)
    place = onnx_dir if out is None else out
    engine = f"{loaded.metadata.component}/model.engine"
    document = {
        "folder": str(place),
        "engine": done.entry.model_dump(mode="json"),
        "parity": done.parity.dict(),
        "manifest": done.manifest.model_dump(mode="json"),
    }
    text = (
        f"{place}\n  edit {loaded.id[:12]}: {loaded.summary}\n"
        f"  {engine} for {done.entry.library} {done.entry.version}, {len(done.entry.refittable)} weights refitted; "
        f"{done.parity.relative:.2g} of the edit's movement from the patched ONNX model"
    )
    result(document, text, as_json)
