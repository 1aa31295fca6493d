"""An image's file: what made it is in it, any damage shows, and what was made from something else is never replaced."""

from __future__ import annotations

import dataclasses
import errno
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from excise.errors import ArtefactError, OutputError, UsageError
from excise.eval.image_file import (
    ImageFormat,
    ImageMetadata,
    ImageState,
    encode_image,
    image_size,
    inspect_image,
    is_sealed,
    read_entries,
    read_image,
    write_image,
)
from excise.output import PARTIAL

METADATA = ImageMetadata(
    case="12-b",
    prompt='a "café",\nwith an 🦉\tand a \x00',
    negative_prompt="",
    seed=2**63 - 1,
    guidance_scale=7.5,
    num_inference_steps=50,
    runtime="served",
    edit_id=None,
    settings="ab" * 32,
)
PIXELS = np.random.default_rng(0).integers(0, 256, (9, 13, 3), np.uint8)
FORMATS: tuple[ImageFormat, ...] = ("png", "webp")


@pytest.fixture(params=FORMATS)
def image_format(request: pytest.FixtureRequest) -> ImageFormat:
    chosen: ImageFormat = request.param
    return chosen


@pytest.fixture
def data(image_format: ImageFormat) -> bytes:
    return encode_image(PIXELS, METADATA, image_format)


@pytest.fixture
def path(tmp_path: Path, image_format: ImageFormat, data: bytes) -> Path:
    path = tmp_path / f"12-b.{image_format}"
    write_image(path, data)
    return path


def test_pixels_and_metadata_come_back(path: Path, data: bytes, image_format: ImageFormat) -> None:
    assert path.read_bytes() == data == encode_image(PIXELS, METADATA, image_format)
    assert np.array_equal(read_image(path), PIXELS)
    assert read_entries(path) == METADATA.entries()
    assert read_entries(path)["excise.prompt"] == METADATA.prompt
    assert (read_entries(path)["excise.seed"], read_entries(path)["excise.edit_id"]) == (str(2**63 - 1), "")
    assert image_size(path) == (9, 13)
    assert inspect_image(path, METADATA) is ImageState.WHOLE
    assert [one.name for one in path.parent.iterdir()] == [path.name]


def test_the_files_are_what_their_formats_say(tmp_path: Path) -> None:
    """Walked by their own rules: every chunk's length and checksum, UTF-8 text, and nothing behind the end."""
    png = encode_image(PIXELS, METADATA)
    place, texts, kinds = 8, {}, []
    while place < len(png):
        (length,) = struct.unpack_from(">I", png, place)
        kind, content = png[place + 4 : place + 8], png[place + 8 : place + 8 + length]
        assert struct.unpack_from(">I", png, place + 8 + length) == (zlib.crc32(kind + content),)
        kinds.append(kind)
        if kind == b"iTXt":
            keyword, rest = content.split(b"\0", 1)
            assert rest[:4] == b"\0\0\0\0"  # not compressed; no language, no translated keyword
            texts[keyword.decode()] = rest[4:].decode()
        place += 12 + length
    assert place == len(png)
    assert kinds[0] == b"IHDR"
    assert kinds[-2:] == [b"iTXt", b"IEND"]
    assert texts.pop("excise.sha256")
    assert texts == METADATA.entries()

    webp = encode_image(PIXELS, METADATA, "webp")
    assert struct.unpack_from("<I", webp, 4) == (len(webp) - 8,)
    place, kinds = 12, []
    while place < len(webp):
        (length,) = struct.unpack_from("<I", webp, place + 4)
        kinds.append(webp[place : place + 4])
        place += 8 + length + length % 2
    assert place == len(webp)
    assert kinds == [b"VP8X", b"VP8L", b"EXIF", b"XSHA"]


def test_every_cut_and_every_flipped_byte_is_damage(path: Path, data: bytes) -> None:
    """The seal covers every byte: it is compared for all of them, the whole inspection for some."""
    assert is_sealed(data)
    flipped = [data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :] for at in range(len(data))]
    cut = [data[:length] for length in range(len(data))]
    assert not any(is_sealed(one) for one in flipped + cut)
    assert not is_sealed(data + b"\0")
    for damaged in (*cut[::17], cut[-1], *flipped[::5], data + b"\0", b"", b"junk"):
        path.write_bytes(damaged)
        assert inspect_image(path, METADATA) is ImageState.DAMAGED
    path.unlink()
    assert inspect_image(path, METADATA) is ImageState.MISSING


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"seed": 4}, "made with seed '9223372036854775807', and this run has '4'"),
        ({"prompt": "a cat"}, 'made with prompt \'a "café"'),
        ({"edit_id": "cd"}, "made with edit_id '', and this run has 'cd'"),
        ({"settings": "cd" * 32}, "made with settings 'abab"),
    ],
)
def test_another_runs_image_is_an_error_that_names_the_difference(
    path: Path, data: bytes, changed: dict[str, object], message: str
) -> None:
    other = dataclasses.replace(METADATA, **changed)  # type: ignore[arg-type]
    with pytest.raises(OutputError, match=message):
        inspect_image(path, other)
    assert path.read_bytes() == data
    if path.suffix == ".png":  # cut off behind its metadata, it still says what it was
        path.write_bytes(data[:-100])
        with pytest.raises(OutputError, match=message):
            inspect_image(path, other)


def test_a_foreign_image_is_an_error(path: Path) -> None:
    Image.fromarray(PIXELS).save(path)
    with pytest.raises(OutputError, match="doesn't say what made it"):
        inspect_image(path, METADATA)
    path.unlink()
    path.mkdir()
    with pytest.raises(OutputError, match="can't be read: Is a directory"):
        inspect_image(path, METADATA)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EACCES])
def test_a_failed_write_leaves_what_was_there(
    path: Path, data: bytes, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def full(self: Path, content: bytes) -> int:
        with open(self, "wb") as stream:
            stream.write(content[:10])
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(Path, "write_bytes", full)
    reason = "Permission denied" if number == errno.EACCES else "no space is left on the disk"
    with pytest.raises(OutputError, match=f"can't be written: {reason}; what is done stays"):
        write_image(path, b"new")
    assert path.read_bytes() == data
    assert not list(path.parent.glob(f"{PARTIAL}*"))


def test_what_is_no_image_or_no_text(tmp_path: Path) -> None:
    with pytest.raises(ArtefactError, match="can't be read as an image"):
        read_image(tmp_path / "none.png")
    with pytest.raises(ArtefactError, match="can't be read"):
        read_entries(tmp_path / "none.png")
    (tmp_path / "cut.png").write_bytes(encode_image(PIXELS, METADATA)[:-200])
    with pytest.raises(ArtefactError, match="start the evaluation again"):
        read_image(tmp_path / "cut.png")
    with pytest.raises(UsageError, match=r"case 12-b: .* isn't text"):
        dataclasses.replace(METADATA, prompt="half a pair \ud83d")
