"""Put the shipped demo model's parts into the work folder as if they had just been trained, to train on from them.

    python -m excise.demo.artwork && python -m excise.demo.unpack
    python -m excise.demo.train_unet --start demo/work/unet-start --lr 5e-4 --steps 6500
    python -m excise.demo.assemble --install demo

The decoder that ships is the sharpened one; it stands in for the first one too. The encoder is the same.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path

from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPModel

from excise.demo import CLIP, MODEL
from excise.errors import OutputError


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("demo/work"))
    work = parser.parse_args().work
    parts = ("tokenizer", "clip", "vae", "vae-sharp", "unet-start")
    if present := [name for name in parts if (work / name).exists()]:
        raise OutputError(f"{work / present[0]} exists already: it would be overwritten")
    vae = AutoencoderKL.from_pretrained(MODEL / "vae").float()
    for name in ("vae", "vae-sharp"):
        vae.save_pretrained(work / name)
    UNet2DConditionModel.from_pretrained(MODEL / "unet").float().save_pretrained(work / "unet-start")
    CLIPModel.from_pretrained(CLIP).float().save_pretrained(work / "clip")
    shutil.copytree(MODEL / "tokenizer", work / "tokenizer")
    return 0


if __name__ == "__main__":
    sys.exit(main())
