"""Train the demo's small ``CLIPModel`` on freshly composed images and their captions.

Contrastive in both directions (Radford et al., 2021) with soft targets: a caption's positives are all images of the
batch that it describes, so equal or partial captions are never pushed apart. Two prototype losses, over "a {object}"
and "art by {artist}", train the zero-shot use directly. Stage ``joint`` trains both towers; stage ``vision``
continues with the text tower frozen, since the diffusion model is trained on it.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPTokenizer, CLIPVisionConfig

from excise.demo.checkpoint import Training, load
from excise.demo.composition import IMAGE_SIZE, Batch, Composer
from excise.demo.train_tokenizer import MAX_LENGTH
from excise.demo.train_vae import pixels
from excise.demo.vocabulary import ARTISTS, BACKGROUNDS, OBJECTS, caption

SHORT = (
    13  #: every caption with its two special tokens fits; the causal mask makes the rest irrelevant to the pooled token
)


def build(tokenizer: CLIPTokenizer) -> CLIPModel:
    """The untrained model: text 256 wide, vision 192 wide, four layers each, 128 shared dimensions."""
    special = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    text = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=MAX_LENGTH,
        projection_dim=128,
        **special,
    )
    vision = CLIPVisionConfig(
        hidden_size=192,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=6,
        image_size=IMAGE_SIZE,
        patch_size=8,
        projection_dim=128,
    )
    model = CLIPModel(CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=128))
    torch.nn.init.normal_(model.text_model.embeddings.position_embedding.weight, std=0.02)
    torch.nn.init.normal_(model.vision_model.embeddings.patch_embedding.weight, std=0.05)
    return model


def describes(captions: list[str], batch: Batch) -> torch.Tensor:
    """Float matrix (captions, images): 1 where all that the caption names is the image's."""
    matches = torch.ones(len(captions), len(batch.objects))
    for names, labels in ((OBJECTS, batch.objects), (ARTISTS, batch.artists), (BACKGROUNDS, batch.colours)):
        index = {name: position for position, name in enumerate(names)}
        for row, text in enumerate(captions):
            named = [index[word] for word in text.split() if word in index]
            if named:
                matches[row] *= torch.from_numpy(labels == named[0])
    return matches


def normalized(features: torch.Tensor) -> torch.Tensor:
    """Unit rows."""
    unit: torch.Tensor = features / features.norm(dim=-1, keepdim=True)
    return unit


def soft_cross_entropy(logits: torch.Tensor, matches: torch.Tensor) -> torch.Tensor:
    """Cross-entropy against the uniform distribution over each row's matches."""
    return -(matches / matches.sum(-1, keepdim=True) * logits.log_softmax(-1)).sum(-1).mean()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("stage", choices=("joint", "vision"))
    parser.add_argument("--work", type=Path, default=Path("demo/work"))
    parser.add_argument("--steps", type=int, default=1100)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    tokenizer = CLIPTokenizer.from_pretrained(arguments.work / "tokenizer")
    model = build(tokenizer)
    joint = arguments.stage == "joint"
    if not joint:
        state = load(arguments.work / "clip-joint.ckpt")
        if state is None:
            parser.error("train the joint stage first")
        model.load_state_dict(state["clip"])
        model.text_model.requires_grad_(False)
        model.text_projection.requires_grad_(False)
    optimizer = torch.optim.AdamW(
        [parameter for parameter in model.parameters() if parameter.requires_grad],
        lr=1e-3 if joint else 6e-4,
        betas=(0.9, 0.98),
        weight_decay=0.02,
    )
    training = Training(
        f"clip {arguments.stage}",
        {"clip": model},
        optimizer,
        checkpoint=arguments.work / f"clip-{arguments.stage}.ckpt",
        steps=arguments.steps,
    )

    def text_features(captions: list[str]) -> torch.Tensor:
        tokens = tokenizer(captions, padding="max_length", max_length=SHORT, return_tensors="pt")
        with torch.set_grad_enabled(joint):
            return normalized(model.get_text_features(input_ids=tokens.input_ids))

    objects = [caption("{a} {object}", object=name) for name in OBJECTS]
    artists = [caption("art by {artist}", artist=name) for name in ARTISTS]
    styles = [caption("the style of {artist}", artist=name) for name in ARTISTS]

    def loss_of_step(step: int) -> tuple[torch.Tensor, dict[str, float]]:
        batch = Composer(arguments.work / "artwork.npz", seed=2_000_000 + step + (0 if joint else 500_000)).draw(
            arguments.batch
        )
        image = normalized(model.get_image_features(pixel_values=pixels(torch.from_numpy(batch.images))))
        distinct = list(dict.fromkeys(batch.captions))
        text = text_features(distinct + objects + (artists if step % 2 else styles))
        scale = model.logit_scale.exp().clamp(max=100)
        logits = scale * text @ image.T
        n, m = len(distinct), len(distinct) + len(objects)
        matches = describes(distinct, batch)
        contrastive = soft_cross_entropy(logits[:n], matches) + soft_cross_entropy(logits[:n].T, matches.T + 1e-9)
        o, a = torch.from_numpy(batch.objects), torch.from_numpy(batch.artists)
        by_object, by_artist = F.cross_entropy(logits[n:m].T, o), F.cross_entropy(logits[m:].T, a)
        figures = {
            "contrastive": contrastive.item(),
            "object": (logits[n:m].argmax(0) == o).float().mean().item(),
            "artist": (logits[m:].argmax(0) == a).float().mean().item(),
        }
        return 0.5 * contrastive + by_object + by_artist, figures

    training.run(loss_of_step, lambda: None)
    model.eval()
    model.save_pretrained(arguments.work / "clip")
    tokenizer.save_pretrained(arguments.work / "clip")
    return 0


if __name__ == "__main__":
    sys.exit(main())
