"""What a network saw is kept: a second pass doesn't call it, and only what changed is looked at again."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from excise.errors import ModelError, OutputError
from excise.eval import observation_cache
from excise.eval.feature_extractor import Fingerprint
from excise.eval.image_file import ImageMetadata, encode_image
from excise.eval.observation_cache import Pictures, features, observations

COUNT = 10


class Network:
    """Sees an image's sum; keeps which images it was shown."""

    name = "summer"
    labels = ("sum",)
    dimension = 2

    def __init__(self, weights: str = "0" * 64, lost: int = 0) -> None:
        self.fingerprint = Fingerprint(name=self.name, weights=weights, preprocessing="none")
        self.shown: list[int] = []
        self.lost = lost

    def image_features(self, images: Sequence[npt.NDArray[np.uint8]]) -> npt.NDArray[np.float32]:
        sums = [int(image.sum()) for image in images]
        self.shown += sums
        return np.array([[one, 1 / (one + 1)] for one in sums[self.lost :]], np.float32).reshape(-1, 2)

    def observe(self, images: Sequence[npt.NDArray[np.uint8]]) -> list[dict[str, Any]]:
        return [{"boxes": [], "third": float(row[0]) / 3} for row in self.image_features(images)]


def write(path: Path, level: int) -> None:
    metadata = ImageMetadata(path.stem, "a cat", "", 0, 1.0, 1, "here", None, "0" * 64)
    path.write_bytes(encode_image(np.full((2, 2, 3), level, np.uint8), metadata))


@pytest.fixture
def pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Pictures:
    monkeypatch.setattr(observation_cache, "BLOCK", 4)
    (tmp_path / "images").mkdir()
    files = [tmp_path / "images" / f"{number}.png" for number in range(COUNT)]
    for number, file in enumerate(files):
        write(file, number)
    return Pictures(files)


def both(folder: Path, network: Network, pictures: Pictures) -> tuple[Any, Any]:
    digests = pictures.digests()
    seen = observations(folder, network, pictures, digests, about="here", progress=False)
    return seen, features(folder, network, pictures, digests, about="here", progress=False)


def test_a_second_pass_shows_the_network_nothing(tmp_path: Path, pictures: Pictures) -> None:
    network = Network()
    seen, rows = both(tmp_path / "seen", network, pictures)
    assert network.shown == [12 * number for number in range(COUNT)] * 2
    assert seen == network.observe(list(pictures))
    assert np.array_equal(rows, network.image_features(list(pictures)))
    assert rows.dtype == np.float32
    again = Network()
    seen_again, rows_again = both(tmp_path / "seen", again, pictures)
    assert again.shown == []
    assert seen_again == seen
    assert np.array_equal(rows_again, rows)


def test_a_changed_image_is_looked_at_again_with_its_block(tmp_path: Path, pictures: Pictures) -> None:
    both(tmp_path / "seen", Network(), pictures)
    write(pictures.files[5], 100)
    network = Network()
    seen, rows = both(tmp_path / "seen", network, pictures)
    assert network.shown == [48, 1200, 72, 84] * 2
    assert seen == network.observe(list(pictures))
    assert np.array_equal(rows, network.image_features(list(pictures)))


def test_another_network_looks_for_itself(tmp_path: Path, pictures: Pictures) -> None:
    both(tmp_path / "seen", Network(), pictures)
    other = Network("1" * 64)
    both(tmp_path / "seen", other, pictures)
    assert len(other.shown) == 2 * COUNT
    first = Network()
    both(tmp_path / "seen", first, pictures)
    assert first.shown == []


@pytest.mark.parametrize("damage", ["cut", "empty", "altered", "gone", "no-hash"])
def test_a_damaged_block_is_made_again(tmp_path: Path, pictures: Pictures, damage: str) -> None:
    expected = both(tmp_path / "seen", Network(), pictures)
    blocks = sorted((tmp_path / "seen").rglob("00001-*"))
    assert len(blocks) == 2
    for block in blocks:
        data = block.read_bytes()
        flipped = bytes([data[-3] ^ 1])
        new = {"cut": data[:-9], "empty": b"", "altered": data[:-3] + flipped + data[-2:], "no-hash": data[65:]}
        block.unlink() if damage == "gone" else block.write_bytes(new[damage])
    network = Network()
    seen, rows = both(tmp_path / "seen", network, pictures)
    assert network.shown == [48, 60, 72, 84] * 2
    assert seen == expected[0]
    assert np.array_equal(rows, expected[1])


def test_images_are_read_one_block_at_a_time(tmp_path: Path, pictures: Pictures) -> None:
    class Peeking(Network):
        def image_features(self, images: Sequence[npt.NDArray[np.uint8]]) -> npt.NDArray[np.float32]:
            assert isinstance(images, Pictures)
            assert len(images) <= 4
            return super().image_features(images)

    both(tmp_path / "seen", Peeking(), pictures)


def test_no_images_are_no_answers(tmp_path: Path) -> None:
    seen, rows = both(tmp_path / "seen", Network(), Pictures([]))
    assert seen == []
    assert rows.shape == (0, 2)


def test_what_cannot_be_kept_is_an_error(tmp_path: Path, pictures: Pictures, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ModelError, match="summer gave something else than one answer an image"):
        both(tmp_path / "lost", Network(lost=1), pictures)
    assert not [path for path in (tmp_path / "lost").rglob("*") if path.is_file()]
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="can't be made"):
        both(tmp_path / "file", Network(), pictures)

    def full(source: Path, target: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OutputError, match="no space is left on the disk"):
        both(tmp_path / "full", Network(), pictures)
