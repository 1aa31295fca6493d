"""Commands that make edits and apply them."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Any

import click

from excise.cli_recipe import number, recipe_options, resolved
from excise.cli_solve import cache_option, device_option, running_options, solve, stage_lines
from excise.console import force_option, json_option, needs, result, say
from excise.errors import UsageError


@click.command()
@click.argument("model")
@recipe_options
@click.option("--explain", is_flag=True, help="Print the whole recipe, and where each value comes from; do nothing.")
@running_options
@click.option(
    "--checkpoints",
    type=click.Path(path_type=Path, file_okay=False),
    help="Where a method that trains keeps what it takes to resume, which it does by itself; by default beside --out, "
    "until that is written.",
)
@click.option("--curve", type=click.Path(path_type=Path), help="Also draw margin and movement by epoch (PNG or SVG).")
@click.option("--out", type=click.Path(path_type=Path), help="The edit file to write.")
@json_option
def edit(
    model: str,
    explain: bool,
    device: str,
    no_certificate: bool,
    no_cache: bool,
    checkpoints: Path | None,
    curve: Path | None,
    out: Path | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Erase concepts from MODEL (a diffusers folder or hub id) and write an edit file.

    Reads the text encoders and the layers that read them only: K and V of a UNet's cross-attention, or the text
    projections of SD3, Flux, HiDream and PixArt. MODEL itself is not changed. "demo:model" is the bundled model.

    The methods that train (esd-x, esd-u, esd-full, ca, ca-full, sa, sa-u) read the whole UNet of a Stable Diffusion 1
    or 2, and take minutes to days. The same command again goes on where one was stopped.

    \b
    Examples:
      excise edit demo:model --erase gun --to sunflower --keep cat --keep dog --out gun.safetensors
      excise edit demo:model --preset weapons --epochs auto --curve weapons.png --out weapons.safetensors
      excise edit demo:model --preset weapons --epochs auto --detector clip:demo --out judged.safetensors
      excise edit CompVis/stable-diffusion-v1-4 --preset nudity --out nudity.safetensors
      excise edit SD_FOLDER --preset artist --erase "Van Gogh" --expand artist --keep-file artists.csv:name \\
          --out van-gogh.safetensors
      excise edit SD_FOLDER --recipe recipe.yaml --explain
      excise edit demo:model --method esd-x --erase gun --iterations 50 --out esd.safetensors
      excise edit SD_FOLDER --method ca --erase "grumpy cat" --to cat --device cuda --out ca.safetensors
    """
    from excise.editfile import save_edit
    from excise.output import check_free

    with needs():
        from excise.edit.parameters import TRAINED
        from excise.edit.recipe import explain as explained
    judging = {name.removeprefix("detector_"): options.pop(name) for name in [*options] if name.startswith("detector")}
    recipe = resolved(options)
    if explain:
        text = explained(recipe)
        result(recipe.model_dump(mode="json"), text.rstrip("\n"), as_json)
        return
    if out is None:
        raise UsageError("--out is missing: name the edit file to write, such as edit.safetensors")
    if out.suffix != ".safetensors":
        raise UsageError(f"--out {out} must end in .safetensors")
    check_free(out)
    trained = recipe.method in TRAINED
    if checkpoints is not None and not trained:
        raise UsageError(f"--checkpoints is for methods that train: {recipe.method} is solved in one go, remove it")
    if curve is not None:
        if trained:
            raise UsageError(f"--curve draws the stages of a closed form: {recipe.method} has none, remove it")
        _check_picture(curve)
    beside = out.with_suffix(".training") if trained and checkpoints is None else None
    started = time.perf_counter()
    made = solve(
        model,
        recipe,
        device,
        certificate=not no_certificate,
        cached=not no_cache,
        judging=judging,
        checkpoints=checkpoints or beside,
    )
    seconds = time.perf_counter() - started
    save_edit(out, made)
    if beside is not None:
        shutil.rmtree(beside)
    lines = [
        f"{out}",
        f"  id      {made.id}",
        f"  {made.summary}",
        *stage_lines(made),
        f"  {seconds:.1f} s, reading the model and the certificate included",
    ]
    if curve is not None:
        with needs("eval"):
            from excise.edit.curves import draw_stages
        draw_stages(curve, made.metadata.stages)
        lines.append(f"  curve   {curve}")
    document = {
        "edit": str(out),
        "id": made.id,
        "seconds": round(seconds, 3),
        "metadata": made.metadata.model_dump(mode="json"),
    }
    result(document, "\n".join(lines), as_json)


def _check_picture(path: Path) -> None:
    from excise.output import check_free

    if path.suffix not in (".png", ".svg", ".pdf"):
        raise UsageError(f"{path} must end in .png, .svg or .pdf")
    check_free(path)


@click.command()
@click.argument("edit_file", metavar="EDIT", type=click.Path(path_type=Path))
@click.argument("model")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="The folder, or the LoRA file, to write.")
@click.option("--as", "kind", type=click.Choice(["pipeline", "lora", "kohya"]), default="pipeline", show_default=True)
@click.option("--rank", type=int, help="Of the LoRA; by default the exact one.")
@click.option("--copy", is_flag=True, help="Copy large unchanged files in place of hard-linking them.")
@force_option
@json_option
def apply(
    edit_file: Path, model: str, out: Path, kind: str, rank: int | None, copy: bool, force: bool, as_json: bool
) -> None:
    """Apply EDIT to MODEL and write an edited diffusers pipeline; MODEL itself is not changed.

    Only the shards with edited weights are written anew. With --as lora the edit is written as a LoRA that
    pipe.load_lora_weights reads, with --as kohya in the layout that A1111 and ComfyUI read.

    \b
    Examples:
      excise apply nudity.safetensors SD_FOLDER --out sd-safe
      excise apply nudity.safetensors SD_FOLDER --as kohya --out nudity-lora.safetensors
    """
    from excise.editfile import load_edit

    with needs():
        from excise.edit.model_folder import resolve
    if kind == "pipeline" and rank is not None:
        raise UsageError("--rank is for --as lora or --as kohya")
    loaded = load_edit(edit_file)
    if kind == "pipeline":
        from excise.edit.apply import apply_edit

        apply_edit(resolve(model), loaded, out, force=force, link=not copy, progress=say)
        result({"model": str(out), "edit": loaded.id}, f"{out}\n  {loaded.summary}", as_json)
        return
    if out.suffix != ".safetensors":
        raise UsageError(f"--out {out} must end in .safetensors")
    from excise.edit.lora_file import write_lora

    made = write_lora(resolve(model), loaded, out, kohya=kind == "kohya", rank=rank, force=force)
    document = {"lora": str(out), "edit": loaded.id, "rank": made.rank, "relative_error": made.error}
    result(document, f"{out}\n  rank {made.rank}, relative error {made.error:.1e}\n  {loaded.summary}", as_json)


@click.command()
@click.argument("model")
@click.argument("edit_files", metavar="EDIT...", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--out", required=True, type=click.Path(path_type=Path), help="The edit file to write.")
@json_option
def stack(model: str, edit_files: tuple[Path, ...], out: Path, as_json: bool) -> None:
    """Make one edit of several that apply to MODEL one after the other.

    Each must have been made for what the ones before it leave: edit the folder that excise apply wrote.

    \b
    Example:
      excise stack SD_FOLDER nudity.safetensors van-gogh.safetensors --out both.safetensors
    """
    from excise.editfile import load_edit, save_edit
    from excise.editstack import stack as stacked
    from excise.output import check_free

    with needs():
        from excise.edit.apply import stored_arrays
        from excise.edit.model_folder import resolve
    check_free(out)
    edits = [load_edit(path) for path in edit_files]
    made = stacked(edits, stored_arrays(resolve(model), [site for each in edits for site in each.sites]))
    save_edit(out, made)
    result({"edit": str(out), "id": made.id}, f"{out}\n  id      {made.id}\n  {made.summary}", as_json)


@click.command("import")
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.argument("model")
@click.option("--erased", multiple=True, metavar="TEXT", help="What the checkpoint is said to have erased.")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="The edit file to write.")
@json_option
def import_checkpoint(checkpoint: Path, model: str, erased: tuple[str, ...], out: Path, as_json: bool) -> None:
    """Make an edit of what CHECKPOINT (a third party's edited denoiser) changes of MODEL.

    Reads RECE's and UCE's .pt, UCE's and ESD's edited-only .safetensors, and Stable Diffusion's original .ckpt names.
    Pickles are read without running any code in them.

    \b
    Example:
      excise import esd-nudity.pt CompVis/stable-diffusion-v1-4 --erased nudity --out esd-nudity.safetensors
    """
    from excise.editfile import save_edit
    from excise.output import check_free

    with needs():
        from excise.edit.imported import imported
        from excise.edit.model_folder import resolve
    check_free(out)
    made, report = imported(checkpoint, resolve(model), erased=erased)
    save_edit(out, made)
    text = "\n".join([f"{out}", f"  id      {made.id}", *(f"  {line}" for line in report)])
    result({"edit": str(out), "id": made.id, "source": made.metadata.source}, text, as_json)


@click.command()
@click.argument("model")
@recipe_options
@click.option(
    "--ridges", default="1e-4,1e-3,1e-2,1e-1,1", show_default=True, metavar="λ,λ,…", help="Values of --ridge to try."
)
@device_option
@cache_option
@click.option("--out", required=True, type=click.Path(path_type=Path), help="The folder to write.")
@json_option
def sweep(model: str, ridges: str, device: str, no_cache: bool, out: Path, as_json: bool, **options: Any) -> None:
    """Solve for several λ and draw what each costs and what it is worth (the trade-off of RECE's Fig. 6).

    Writes sweep.json, sweep.png and an edit file for each λ.

    \b
    Example:
      excise sweep demo:model --preset weapons --ridges 1e-3,1e-2,1e-1,1 --out weapons-sweep
    """
    import json

    from excise.editfile import save_edit
    from excise.output import new_folder

    values = [number("--ridges", text) for text in ridges.split(",") if text.strip()]
    if not values:
        raise UsageError("--ridges is empty: give one or more values of λ, such as 1e-3,1e-1")
    # By name: what is the same to six digits is one.
    recipes = {f"{value:g}": resolved({**options, "ridge": value}) for value in values}
    if any(recipe.method != "rece" or recipe.epochs == 0 for recipe in recipes.values()):
        raise UsageError("--ridges are values of RECE's λ: give --method rece, and --epochs 1 or more or auto")
    with needs("eval"):
        from excise.edit.curves import draw_sweep
    with new_folder(out) as folder:
        points = []
        for value, recipe in recipes.items():
            say(f"λ = {value}")
            made = solve(model, recipe, device, certificate=True, cached=not no_cache)
            name = f"ridge-{value}.safetensors"
            save_edit(folder / name, made)
            last = [stage for stage in made.metadata.stages if stage.accepted][-1]
            points.append(
                {"ridge": recipe.ridge, "margin": last.margin, "moved": last.moved, "stage": last.stage, "edit": name}
            )
        (folder / "sweep.json").write_text(json.dumps({"points": points}, indent=2) + "\n")
        draw_sweep(folder / "sweep.png", points)
    lines = [f"  λ = {p['ridge']:<8g} margin {p['margin']:.4f}  kept moved {p['moved']:.2e}" for p in points]
    result({"folder": str(out), "points": points}, "\n".join([str(out), *lines]), as_json)
