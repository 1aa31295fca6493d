"""The command ``excise verify``: is what will be served the edited model?"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from excise.console import json_option, needs, result, say
from excise.errors import ArtefactError, UsageError

if TYPE_CHECKING:
    from excise.editfile import Edit
    from excise.eval.verification_sides import SideSpec
    from excise.eval.verification_verdict import Thresholds

_texts: dict[str, Any] = {"multiple": True, "metavar": "TEXT"}


@click.command()
@click.argument("a", metavar="A")
@click.argument("b", metavar="B")
@click.option("--base", required=True, metavar="SIDE", help="The unedited model, which gives the scale.")
@click.option("--edit", "edit_file", type=click.Path(path_type=Path), help="The edit file: it names the prompts.")
@click.option("--erased", help="What was erased, in place of the edit's own.", **_texts)
@click.option("--kept", help="What was kept, in place of the edit's own.", **_texts)
@click.option("--neutral", help="Neither; a few are built in.", **_texts)
@click.option("--prompts", type=int, default=4, show_default=True, help="At most so many of each group.")
@click.option("--steps", type=int, default=20, show_default=True, help="Denoising steps.")
@click.option("--guidance", type=float, default=7.5, show_default=True, help="Guidance scale.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of the initial latents and of noise.")
@click.option("--timesteps", type=int, default=5, show_default=True, help="At how many the denoiser is compared.")
@click.option("--max-to-move", type=float, help="Error allowed, relative to how far the edit moved the output.")
@click.option("--max-relative", type=float, help="Error allowed, relative to the output; where that is more.")
@click.option("--end-to-end", is_flag=True, help="Judge latents and images alone, not single components.")
@click.option("--components", is_flag=True, help="Compare single components alone, without a loop: SD 3 and Flux too.")
@click.option("--out", type=click.Path(path_type=Path), help="Also write report.json, a picture and reproduce.sh here.")
@json_option
def verify(
    a: str,
    b: str,
    base: str,
    edit_file: Path | None,
    prompts: int,
    steps: int,
    guidance: float,
    seed: int,
    timesteps: int,
    max_to_move: float | None,
    max_relative: float | None,
    end_to_end: bool,
    components: bool,
    out: Path | None,
    as_json: bool,
    **texts: tuple[str, ...],
) -> None:
    """Compare B, which is to be served, with A, the edited model: exit 0 only if B computes what A does.

    A, B and --base are torch:DIR (a diffusers folder) or onnx:DIR (an export), or a bare DIR. Options follow a "?":
    onnx:DIR?provider=cpu|cuda|tensorrt, torch:DIR?device=cuda&dtype=float16, and edit=FILE for both, which applies an
    edit in memory: torch:MODEL?edit=FILE is the exact reference, where a folder may hold rounded weights.

    Text encoder, denoiser and VAE decoder get the same inputs; the loop starts from the same latents. An error is
    measured against how far the edit moved the output, |B - A| / |A - base|: 1 is an export that lost the edit.
    The tolerances depend on the precision; fp16 hides an error in a single small layer that fp32 shows. Use
    --end-to-end where the edit sits in another component of B than of A, as after excise fuse.

    The loop is that of Stable Diffusion 1, 2 and XL. With --components every family that excise exports is compared:
    text encoders, denoiser and VAE decoder, of torch:DIR against onnx:DIR. What isn't compared is printed.

    \b
    Examples:
      excise verify "SD_FOLDER?edit=nudity.safetensors" sd-onnx --base SD_FOLDER --edit nudity.safetensors
      excise verify sd-safe "onnx:sd-onnx?provider=cuda" --base SD_FOLDER --erased nudity --kept "a person"
      excise verify onnx:sd-onnx onnx:sd-onnx-fp16 --base onnx:sd-onnx-base --out parity --json
      excise verify "torch:XL?edit=nudity.safetensors" onnx:xl-onnx --base torch:XL --edit nudity.safetensors
      excise verify "torch:FLUX?edit=nudity.safetensors" onnx:flux-onnx --base torch:FLUX --components
    """
    from excise.editfile import load_edit
    from excise.output import check_free

    with needs("eval"):
        from excise.eval.verification import verify as verified
        from excise.eval.verification_measures import Settings
        from excise.eval.verification_prompts import choose_prompts
        from excise.eval.verification_report import as_json as document
        from excise.eval.verification_report import table, write_report
        from excise.eval.verification_sides import parse_side
        from excise.eval.verification_verdict import adjusted
        from excise.export.pipeline import load_pipeline
    if out is not None:
        check_free(out)
        with needs("eval"):
            import matplotlib.figure  # noqa: F401 (before the long part)
    reference, served, unedited = (parse_side(text) for text in (a, b, base))
    applied = next((side.options["edit"] for side in (reference, served) if "edit" in side.options), None)
    named = edit_file or (Path(applied) if applied else None)
    edit = load_edit(named) if named is not None else None
    chosen = choose_prompts(edit=edit, summary=_summary(served, reference), given=dict(texts), limit=prompts)
    settings = Settings(num_inference_steps=steps, guidance_scale=guidance, seed=seed, timesteps=timesteps)
    if components:
        _components(
            reference,
            served,
            unedited,
            chosen.groups,
            edit,
            settings.timesteps,
            (max_to_move, max_relative),
            end_to_end or out is not None,
            as_json,
        )
        return

    def adjust(thresholds: Thresholds) -> Thresholds:
        return adjusted(thresholds, max_to_move=max_to_move, max_relative=max_relative)

    with needs():
        done = verified(
            reference,
            served,
            unedited,
            chosen,
            settings,
            load_pipeline,
            edit=edit,
            adjust=adjust,
            end_to_end=end_to_end,
            say=say,
        )
    again = ["verify", str(reference), str(served)]
    options: dict[str, Any] = {
        "base": unedited,
        "edit": edit_file,
        "prompts": prompts,
        "steps": steps,
        "guidance": guidance,
    }
    options |= {"seed": seed, "timesteps": timesteps, "max-to-move": max_to_move, "max-relative": max_relative}
    again += [part for name, value in options.items() if value is not None for part in (f"--{name}", str(value))]
    again += [part for group, each in chosen.groups.items() for text in each for part in (f"--{group}", text)]
    again += ["--end-to-end"] if end_to_end else []
    if out is not None:
        write_report(out, done, again)
    result(document(done, again), table(done), as_json)
    if not done.passed:
        sys.exit(1)


def _components(
    reference: SideSpec,
    served: SideSpec,
    unedited: SideSpec,
    prompts: dict[str, tuple[str, ...]],
    edit: Edit | None,
    timesteps: int,
    tolerances: tuple[float | None, float | None],
    of_the_loop: bool,
    as_json: bool,
) -> None:
    """Compare single components, print the figures, and leave with 1 unless all are within the tolerances."""
    from excise.eval.verification_components import rounding, table, timesteps_of
    from excise.eval.verification_verdict import DEFAULTS, adjusted

    if of_the_loop:
        raise UsageError("--components has no --end-to-end and no --out: leave them out, or print --json to a file")
    kinds = (reference.kind, served.kind, unedited.kind)
    given = {*served.options, *unedited.options, *reference.options} - {"edit"}
    if kinds != ("torch", "onnx", "torch") or given or "edit" in {**served.options, **unedited.options}:
        raise UsageError(
            "--components compares torch:DIR with onnx:DIR, measured from --base torch:DIR, on the CPU in float32: "
            f"A is {reference}, B is {served}, --base is {unedited}; ?edit=FILE is A's alone"
        )
    with needs("export"):
        from excise.export.component_parity import component_parity
    limits = adjusted(
        DEFAULTS[rounding(served.folder)], max_to_move=tolerances[0], max_relative=tolerances[1]
    ).component
    done = component_parity(
        reference.folder,
        served.folder,
        unedited.folder,
        prompts,
        edit=edit if "edit" in reference.options else None,
        timesteps=timesteps_of(unedited.folder, timesteps),
        max_to_move=limits.max_to_move,
        max_relative=limits.max_relative,
        progress=say,
    )
    result(done.dict(), table(done.dict()), as_json)
    if not done.passed:
        sys.exit(1)


def _summary(*sides: SideSpec) -> str | None:
    """The first edit that a folder's manifest names, on one line."""
    from excise.manifest import read_manifest

    for side in sides:
        try:
            manifest = read_manifest(side.folder)
        except ArtefactError:
            continue
        if manifest.edit is not None:
            return manifest.edit.summary
    return None
