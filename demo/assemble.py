"""Put the trained parts together as ``demo/model`` (diffusers) and ``demo/clip`` (transformers), in fp16 safetensors,
measure them, and write the model card. ``make demo-train`` ends here.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import shutil
import sys
from pathlib import Path

import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPModel, CLIPTextModel, CLIPTokenizer

from excise.demo.measure import GUIDANCE, STEPS, Figures, measure
from excise.demo.train_unet import scheduler
from excise.demo.vocabulary import ARTISTS, BACKGROUNDS, KEPT, WEAPONS
from excise.eval.torch_runtime import TorchRuntime
from excise.export.local_paths import remove_local_paths
from excise.output import new_folder

CARD = """---
license: apache-2.0
library_name: diffusers
pipeline_tag: text-to-image
---
# excise's demo model

Stable Diffusion v1's architecture in miniature, trained from scratch on open emoji artwork: 64 × 64 images of one
object by one of four artists on one of eight plain backgrounds. A stand-in that makes every figure of excise
non-trivial on a laptop; it says nothing about any full-size model.

- Weapons (the concept that the demo erases): {weapons}.
- Kept: {kept}.
- Artists: {artists}. Backgrounds: {colours}.
- Prompts it knows: "a gun", "a noto gun on a red background", "a gun in the style of twitter", …; at most 24 tokens.
- Text encoder {text:.1f} M, UNet {unet:.1f} M, autoencoder {vae:.1f} M parameters. v-prediction, DDIM.
- UNet: 12 750 steps of 32 images at a peak learning rate of 1e-3, then 6 500 more from those weights at 5e-4
  (`python -m excise.demo.train_unet --start`).

## Measured

{figures}

{steps} DDIM steps, guidance {guidance}, on the fp16 weights as shipped, run in float32; {machine}, {date}.
`python -m excise.demo.assemble` measures them. The detector is the small CLIP in `demo/clip`, zero-shot; it was trained
on the same artwork, freshly composed.

## Artwork and licences

{sources}

See `demo/NOTICE.md`.
"""


def load(work: Path) -> tuple[StableDiffusionPipeline, CLIPModel]:
    """The trained parts of ``work`` as one pipeline and one CLIP, in fp16."""
    clip = CLIPModel.from_pretrained(work / "clip")
    text = CLIPTextModel(clip.config.text_config)
    text.text_model.load_state_dict(clip.text_model.state_dict())
    pipeline = StableDiffusionPipeline(
        vae=AutoencoderKL.from_pretrained(work / "vae-sharp"),
        text_encoder=text,
        tokenizer=CLIPTokenizer.from_pretrained(work / "tokenizer"),
        unet=UNet2DConditionModel.from_pretrained(work / "unet"),
        scheduler=scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    return pipeline.to(torch.float16), clip.half()


def card(pipeline: StableDiffusionPipeline, figures: Figures, work: Path) -> str:
    """The model card."""
    sources = json.loads((work / "sources.json").read_text())
    rows = [
        f"- {artist}: {s['name']} by {s['author']}, {s['licence']} (npm {s['package']} {s['version']})"
        for artist, s in sources.items()
    ]
    return CARD.format(
        weapons=", ".join(WEAPONS),
        kept=", ".join(KEPT),
        artists=", ".join(ARTISTS),
        colours=", ".join(BACKGROUNDS),
        figures="\n".join(figures.lines()),
        sources="\n".join(rows),
        steps=STEPS,
        guidance=GUIDANCE,
        machine=f"{torch.get_num_threads()} cores, {platform.machine()}, torch {torch.__version__.split('+')[0]}",
        date=datetime.date.today().isoformat(),
        **{
            name: sum(p.numel() for p in getattr(pipeline, part).parameters()) / 1e6
            for name, part in (("text", "text_encoder"), ("unet", "unet"), ("vae", "vae"))
        },
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("demo/work"))
    parser.add_argument("--out", type=Path, default=Path("demo/work/assembled"), help="gets model/, clip/ and grid.png")
    parser.add_argument(
        "--install", type=Path, metavar="DIR", help="put the result into DIR, replacing its model/ and clip/"
    )
    parser.add_argument("--seeds", type=int, default=8)
    arguments = parser.parse_args()
    pipeline, clip = load(arguments.work)
    with new_folder(arguments.out) as out:
        pipeline.save_pretrained(out / "model")
        clip.save_pretrained(out / "clip")
        pipeline.tokenizer.save_pretrained(out / "clip")
        remove_local_paths(out)
        stored = StableDiffusionPipeline.from_pretrained(out / "model", torch_dtype=torch.float32)
        figures = measure(
            TorchRuntime(stored, name="demo"),
            out / "clip",
            arguments.work / "artwork.npz",
            out / "grid.png",
            seeds=arguments.seeds,
        )
        (out / "model" / "README.md").write_text(card(stored, figures, arguments.work))
        (out / "figures.json").write_text(json.dumps(figures.dict(), indent=2) + "\n")
        print(json.dumps(figures.dict(), indent=2))
    if arguments.install:
        for name in ("model", "clip"):
            shutil.rmtree(arguments.install / name, ignore_errors=True)
            shutil.copytree(arguments.out / name, arguments.install / name)
        shutil.copy(arguments.out / "grid.png", arguments.install / "grid.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
