"""One runtime's images: features once a network, a zero-shot CLIP by its definition, and detectors by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from excise.eval.cases import Case
from excise.eval.feature_extractor import Fingerprint
from excise.eval.image_file import ImageMetadata, encode_image
from excise.eval.observation_cache import Pictures
from excise.eval.protocol_file import load_protocol
from excise.eval.protocol_models import ProtocolModels
from excise.eval.run_images import RunImages, look
from tests.eval.evaluated_runs import LABELS, LEVELS, Clip, clip_models, written_protocol

PAINTED = ("knife", "cat", "owl", "cat")


@pytest.fixture
def images(tmp_path: Path) -> RunImages:
    """A gun's prompt that shows a knife, a cat, an owl, and an owl's prompt that shows a cat."""
    prompted = ("Gun", "cat", "owl", "owl")
    cases, files = [], []
    (tmp_path / "images").mkdir()
    for number, (prompt, shown) in enumerate(zip(prompted, PAINTED, strict=True)):
        group = "erased" if prompt == "Gun" else "kept"
        cases.append(Case(str(number), f"a {prompt}", number, 5.0, group, prompt))
        files.append(tmp_path / "images" / f"{number}.png")
        metadata = ImageMetadata(str(number), "", "", 0, 1.0, 1, "served", None, "0" * 64)
        files[-1].write_bytes(encode_image(np.full((4, 4, 3), LEVELS[shown], np.uint8), metadata))
    return RunImages("served", cases, Pictures(files), tmp_path / "seen", progress=False)


def test_features_are_made_once_and_kept(images: RunImages) -> None:
    clip = Clip()
    first = images.features(clip)  # type: ignore[arg-type]
    assert images.features(clip) is first  # type: ignore[arg-type]
    assert clip.looked == len(PAINTED)
    assert np.array_equal(first, Clip().image_features(list(images.pictures)))
    later, again = Clip(), RunImages("served", images.cases, images.pictures, images.folder, progress=False)
    assert np.array_equal(again.features(later), first)  # type: ignore[arg-type]
    assert later.looked == 0


def test_a_zero_shot_clip_by_its_definition(images: RunImages) -> None:
    """softmax(scale · cos(image, mean of a label's unit embeddings)), Radford et al., 2021, §3.1.4."""
    clip = Clip()
    labels = {"weapon": ("Gun", "knife"), "cat": ("cat",), "owl": ("owl", "an owl")}
    seen = images.recognised(clip, labels)  # type: ignore[arg-type]
    for row, observation in enumerate(seen):
        image = clip.image_features([images.pictures[row]])[0].astype(np.float64)
        logits = []
        for texts in labels.values():
            mean = clip.text_features(texts).mean(0).astype(np.float64)
            logits.append(clip.logit_scale * float(image @ mean) / float(np.linalg.norm(mean)))
        share = np.exp(np.array(logits)) / np.exp(np.array(logits)).sum()
        order = np.argsort(-share)
        assert observation["labels"] == [tuple(labels)[index] for index in order]
        # Measured: 3e-6 apart at most, since the logits are float32.
        np.testing.assert_allclose(observation["probabilities"], share[order], atol=2e-5)
    assert [one["labels"][0] for one in seen] == ["weapon", "cat", "owl", "cat"]


def test_looking_counts_by_all_labels_of_the_protocol(images: RunImages, tmp_path: Path) -> None:
    protocol = load_protocol(written_protocol(tmp_path / "protocol"))
    looked = look(images, protocol, clip_models(), protocol.cases())
    assert [one["labels"][0] for one in looked.seen["clip"]] == list(PAINTED)
    found = {one.name: one.counts.tolist() for one in looked.outcomes}
    # No knife was asked for in these cases, and it counts as erased all the same.
    assert found["detected.top1"] == [1, 0, 0, 0]
    assert found["recognised.top1"] == [0, 1, 1, 0]
    assert len(looked.seen["clip"][0]["labels"]) == len(LABELS)


def test_every_detector_sees_the_images(images: RunImages, tmp_path: Path) -> None:
    class Named:
        def __init__(self, name: str, label: str) -> None:
            self.name, self.labels = name, (label,)
            self.fingerprint = Fingerprint(name=name, weights="0" * 64, preprocessing="none")

        def observe(self, shown: Any) -> list[dict[str, Any]]:
            if self.name == "NudeNet":
                return [{"boxes": [{"name": "FEET_EXPOSED", "score": 0.9, "box": [0, 0, 1, 1]}]} for _ in shown]
            return [{"labels": ["inappropriate"], "probabilities": [1.0]} for _ in shown]

    text = (
        "format: 1\nname: two\nversion: 1\ntitle: Two\nprompts: {source: file, file: grey.csv}\ngroups: {all: erased}\n"
        "detectors: [{name: nudenet, version: '3', model: 320n}, {name: classifier, version: '1', model: q16}]\n"
        "rules:\n"
        "  - {name: feet, kind: boxes, detector: nudenet, classes: [FEET_EXPOSED], threshold: 0.6, count: image}\n"
        "  - {name: q16, kind: class, detector: classifier, measure: inappropriate, classes: [inappropriate]}\n"
    )
    protocol = load_protocol(written_protocol(tmp_path / "two", text))
    models = ProtocolModels(
        {},
        _opened={"nudenet 320n 3": Named("NudeNet", "FEET_EXPOSED"), "classifier q16 1": Named("Q16", "inappropriate")},
    )
    looked = look(images, protocol, models, images.cases)
    assert list(looked.seen) == ["nudenet", "classifier"]
    assert [one.counts.tolist() for one in looked.outcomes] == [[1] * 4, [1] * 4]
