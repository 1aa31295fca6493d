"""Commands that make edits and apply them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from excise.cli_recipe import number, recipe_options, resolved
from excise.console import force_option, json_option, needs, result, say
from excise.errors import UsageError

if TYPE_CHECKING:
    from excise.edit.auto_epochs import Probe
    from excise.edit.recipe import Recipe
    from excise.editfile import Edit

F = TypeVar("F", bound=Callable[..., Any])


device_option = click.option(
    "--device", default="cpu", show_default=True, metavar="DEVICE", help="cpu, cuda, cuda:1, …"
)
cache_option = click.option("--no-cache", is_flag=True, help="Neither read nor write cached embeddings.")


def running_options(function: F) -> F:
    """Where an edit is computed, what is measured, and how RECE's epochs are judged."""
    texts: dict[str, Any] = {"multiple": True, "metavar": "TEXT"}
    options = [
        device_option,
        click.option("--no-certificate", is_flag=True, help="Don't measure how well the concept can be brought back."),
        cache_option,
        click.option("--detector", metavar="clip:DIR", help="Judge RECE's epochs by pictures; clip:demo is bundled."),
        click.option("--detector-label", "detector_labels", help="What counts; else what is erased.", **texts),
        click.option(
            "--detector-other", "detector_others", help="What doesn't; else targets and what is kept.", **texts
        ),
        click.option("--detector-images", type=int, default=4, show_default=True, help="Pictures for each concept."),
    ]
    for option in reversed(options):
        function = option(function)
    return function


@click.command()
@click.argument("model")
@recipe_options
@click.option("--explain", is_flag=True, help="Print the whole recipe, and where each value comes from; do nothing.")
@running_options
@click.option("--curve", type=click.Path(path_type=Path), help="Also draw margin and movement by epoch (PNG or SVG).")
@click.option("--out", type=click.Path(path_type=Path), help="The edit file to write.")
@json_option
def edit(
    model: str,
    explain: bool,
    device: str,
    no_certificate: bool,
    no_cache: bool,
    curve: Path | None,
    out: Path | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Erase concepts from MODEL (a diffusers folder or hub id) and write an edit file.

    Reads the text encoders and the layers that read them only: K and V of a UNet's cross-attention, or the text
    projections of SD3, Flux, HiDream and PixArt. MODEL itself is not changed. "demo:model" is the bundled model.

    \b
    Examples:
      excise edit demo:model --erase gun --to sunflower --keep cat --keep dog --out gun.safetensors
      excise edit demo:model --preset weapons --epochs auto --curve weapons.png --out weapons.safetensors
      excise edit demo:model --preset weapons --epochs auto --detector clip:demo --out judged.safetensors
      excise edit CompVis/stable-diffusion-v1-4 --preset nudity --out nudity.safetensors
      excise edit SD_FOLDER --preset artist --erase "Van Gogh" --expand artist --keep-file artists.csv:name \\
          --out van-gogh.safetensors
      excise edit SD_FOLDER --recipe recipe.yaml --explain
    """
    from excise.editfile import save_edit
    from excise.output import check_free

    with needs():
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
    if curve is not None:
        _check_picture(curve)
    made = _solve(model, recipe, device, certificate=not no_certificate, cached=not no_cache, judging=judging)
    save_edit(out, made)
    lines = [f"{out}", f"  id      {made.id}", f"  {made.summary}", *_stage_lines(made)]
    if curve is not None:
        with needs("eval"):
            from excise.edit.curves import draw_stages
        draw_stages(curve, made.metadata.stages)
        lines.append(f"  curve   {curve}")
    document = {"edit": str(out), "id": made.id, "metadata": made.metadata.model_dump(mode="json")}
    result(document, "\n".join(lines), as_json)


def _check_picture(path: Path) -> None:
    from excise.output import check_free

    if path.suffix not in (".png", ".svg", ".pdf"):
        raise UsageError(f"{path} must end in .png, .svg or .pdf")
    check_free(path)


def _solve(
    model: str, recipe: Recipe, device: str, *, certificate: bool, cached: bool, judging: dict[str, Any] | None = None
) -> Edit:
    with needs():
        from excise.edit.cache import EmbeddingCache, default_folder
        from excise.edit.erase import erase
        from excise.edit.model_folder import resolve
    cache = EmbeddingCache(default_folder(say) if cached else None, say=say)
    folder = resolve(model)
    probe = _probe(folder, recipe, device, judging) if judging else None
    return erase(folder, recipe, device=device, certificate=certificate, cache=cache, probe=probe, progress=say)


def _probe(folder: Path, recipe: Recipe, device: str, judging: dict[str, Any]) -> Probe | None:
    """RECE's epochs judged by pictures, where a detector is given."""
    if judging["detector"] is None:
        if judging["labels"] or judging["others"]:
            raise UsageError("--detector-label and --detector-other need --detector clip:DIR")
        return None
    with needs("eval"):
        from excise.edit.model_folder import read_sites
        from excise.edit.site_selection import selection
        from excise.eval.epoch_probe import clip_probe
        from excise.export.pipeline import load_pipeline
    sites = read_sites(folder, select=selection(recipe, folder, values_only=False))
    return clip_probe(recipe, sites, lambda: load_pipeline(folder), device=device, **judging)


def _stage_lines(made: Edit) -> list[str]:
    """The figures of each stage, for people."""
    lines = []
    for stage in made.metadata.stages:
        margin = "" if stage.margin is None else f"margin {stage.margin:.3f}  "
        left_out = "" if stage.accepted else "  (left out: the margin gains too little, or nothing is detected)"
        shown = "" if stage.detected is None else f"  detected {stage.detected:.0%}"
        lines.append(f"  {stage.stream} {stage.stage:<9} {margin}kept moved {stage.moved:.2e}{shown}{left_out}")
    return lines


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
    with needs("eval"):
        from excise.edit.curves import draw_sweep
    with new_folder(out) as folder:
        points = []
        for value in values:
            say(f"λ = {value:g}")
            recipe = resolved({**options, "ridge": value})
            made = _solve(model, recipe, device, certificate=True, cached=not no_cache)
            name = f"ridge-{value:g}.safetensors"
            save_edit(folder / name, made)
            last = [stage for stage in made.metadata.stages if stage.accepted][-1]
            points.append(
                {"ridge": value, "margin": last.margin, "moved": last.moved, "stage": last.stage, "edit": name}
            )
        (folder / "sweep.json").write_text(json.dumps({"points": points}, indent=2) + "\n")
        draw_sweep(folder / "sweep.png", points)
    lines = [f"  λ = {p['ridge']:<8g} margin {p['margin']:.3f}  kept moved {p['moved']:.2e}" for p in points]
    result({"folder": str(out), "points": points}, "\n".join([str(out), *lines]), as_json)
