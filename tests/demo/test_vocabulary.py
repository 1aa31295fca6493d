"""What the demo knows is consistent, and its tokenizer reads it word by word."""

from __future__ import annotations

import json
import random
from pathlib import Path

from excise.demo.vocabulary import (
    ARTISTS,
    BACKGROUNDS,
    KEPT,
    OBJECTS,
    TEMPLATE_WEIGHTS,
    TEMPLATES,
    WEAPONS,
    all_captions,
    article,
    caption,
    draw_caption,
)


def test_objects_are_weapons_and_kept() -> None:
    assert set(WEAPONS) | set(KEPT) == set(OBJECTS)
    assert not set(WEAPONS) & set(KEPT)
    assert len(WEAPONS) == 6
    assert len(OBJECTS) >= 32
    assert len(set(OBJECTS.values())) == len(OBJECTS)
    assert not (set(OBJECTS) & set(ARTISTS)) | (set(OBJECTS) & set(BACKGROUNDS))


def test_captions() -> None:
    assert len(TEMPLATES) == len(TEMPLATE_WEIGHTS)
    assert caption("{a} {object} on {colour}", object="owl", colour="red") == "an owl on red"
    assert [article(name) for name in ("axe", "dog")] == ["an", "a"]
    drawn = {draw_caption(random.Random(n), object="dog", artist="noto", colour="red") for n in range(200)}
    assert drawn <= set(all_captions())
    assert len(drawn) == len(TEMPLATES) - 1  # "a dog" comes from two templates


def test_every_caption_fits_the_text_encoder(demo_model: Path) -> None:
    vocabulary = json.loads((demo_model / "tokenizer" / "vocab.json").read_text())
    words = {word for text in all_captions() for word in text.split()}
    assert {word for word in words if f"{word}</w>" not in vocabulary} == set()
    assert max(len(text.split()) for text in all_captions()) + 2 <= 24
