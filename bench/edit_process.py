"""``excise edit`` as a whole process on a full-size Stable Diffusion 1.4: wall time and peak memory.

    python bench/edit_process.py [--folder DIR] [--repeat N] [--json] [-- EXTRA OPTIONS OF excise edit]

The weights are random, from a seed; the configuration, and so every shape and size on disk, is the real one. The
folder (4.3 GB; the whole pipeline, with a tokenizer of as many entries) is made once and used again. Each run is a
fresh process without a cache of embeddings; before each, the files are read once, so that the disk isn't what is
measured.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

UNET = {
    "_class_name": "UNet2DConditionModel",
    "_diffusers_version": "0.39.0",
    "sample_size": 64,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": [320, 640, 1280, 1280],
    "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
    "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
    "layers_per_block": 2,
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
}
TEXT = {
    "architectures": ["CLIPTextModel"],
    "model_type": "clip_text_model",
    "vocab_size": 49408,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "max_position_embeddings": 77,
    "hidden_act": "quick_gelu",
    "bos_token_id": 49406,
    "eos_token_id": 49407,
    "pad_token_id": 49407,
}
VAE = {
    "_class_name": "AutoencoderKL",
    "_diffusers_version": "0.39.0",
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
    "sample_size": 512,
}
SCHEDULER = {
    "_class_name": "PNDMScheduler",
    "_diffusers_version": "0.39.0",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "skip_prk_steps": True,
    "steps_offset": 1,
}
INDEX = {
    "_class_name": "StableDiffusionPipeline",
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
    "scheduler": ["diffusers", "PNDMScheduler"],
    "safety_checker": [None, None],
    "feature_extractor": [None, None],
    "requires_safety_checker": False,
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
}


def make_folder(folder: Path) -> None:
    """Write the pipeline, without a safety checker."""
    import torch
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from safetensors.torch import save_file
    from transformers import CLIPTextConfig, CLIPTextModel

    partial = Path(tempfile.mkdtemp(dir=folder.absolute().parent, prefix=".partial-"))
    generator = torch.Generator().manual_seed(0)
    with torch.device("meta"):
        models = {
            "unet": UNet2DConditionModel.from_config(dict(UNET)),
            "text_encoder": CLIPTextModel(CLIPTextConfig(**TEXT)),
            "vae": AutoencoderKL.from_config(dict(VAE)),
        }
    for component, config, stem in (
        ("unet", UNET, "diffusion_pytorch_model"),
        ("text_encoder", TEXT, "model"),
        ("vae", VAE, "diffusion_pytorch_model"),
    ):
        progress(f"making {component}")
        (partial / component).mkdir()
        (partial / component / "config.json").write_text(json.dumps(config))
        # By each one's number of inputs, so that activations stay finite; norms' weights are 1.
        weights = {
            name: (
                torch.randn(p.shape, generator=generator) * p[0].numel() ** -0.5
                if p.ndim > 1
                else torch.ones(p.shape) * ("norm" in name and name.endswith("weight"))
            )
            for name, p in models[component].named_parameters()
        }
        save_file(weights, partial / component / f"{stem}.safetensors", {"format": "pt"})
    make_tokenizer(partial / "tokenizer")
    (partial / "scheduler").mkdir()
    (partial / "scheduler" / "scheduler_config.json").write_text(json.dumps(SCHEDULER))
    (partial / "model_index.json").write_text(json.dumps(INDEX))
    partial.rename(folder)


def make_tokenizer(folder: Path) -> None:
    """The demo model's tokenizer, filled up to CLIP's number of entries."""
    from excise.demo import MODEL

    shutil.copytree(MODEL / "tokenizer", folder)
    vocabulary = json.loads((folder / "vocab.json").read_text())
    special = [name for name in vocabulary if name.startswith("<|")]
    names = [name for name in vocabulary if name not in special]
    names += [f"filler{number}</w>" for number in range(TEXT["vocab_size"] - len(names) - 2)]
    ids = {name: number for number, name in enumerate(names)}
    (folder / "vocab.json").write_text(json.dumps({**ids, "<|startoftext|>": 49406, "<|endoftext|>": 49407}))
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config.pop("added_tokens_decoder", None)
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "model_max_length": 77}))


def progress(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def measure(command: list[str]) -> tuple[float, float]:
    """Seconds and peak resident GB of one process."""
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - start
    if status:
        raise SystemExit(f"{' '.join(command)} failed")
    return seconds, usage.ru_maxrss / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "excise-bench-sd14")
    parser.add_argument("--make", action="store_true", help="make the folder and measure nothing")
    parser.add_argument("--repeat", type=int, default=3, metavar="N")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    parser.add_argument("options", nargs="*", help="for excise edit; by default --preset nudity")
    arguments = parser.parse_args()
    if arguments.make:
        make_folder(arguments.folder)
        return
    if not arguments.folder.exists():
        # Apart: a child's peak memory counts what its parent held when it started it.
        subprocess.run([sys.executable, __file__, "--make", "--folder", str(arguments.folder)], check=True)
    for file in arguments.folder.rglob("*.safetensors"):
        with file.open("rb") as opened:
            while opened.read(2**24):
                pass
    runs = []
    with tempfile.TemporaryDirectory() as out:
        for number in range(arguments.repeat):
            progress(f"run {number + 1} of {arguments.repeat}")
            command = [sys.executable, "-m", "excise", "edit", str(arguments.folder), "--no-cache"]
            command += arguments.options or ["--preset", "nudity"]
            runs.append(measure([*command, "--out", f"{out}/{number}.safetensors"]))
    document = {
        "seconds": statistics.median(seconds for seconds, _ in runs),
        "peak_gb": max(memory for _, memory in runs),
        "runs": runs,
        "options": arguments.options or ["--preset", "nudity"],
        "torch": importlib.metadata.version("torch"),
        "cores": os.cpu_count(),
    }
    print(
        json.dumps(document, indent=2)
        if arguments.json
        else f"{document['seconds']:.2f} s, {document['peak_gb']:.2f} GB peak"
    )


if __name__ == "__main__":
    main()
