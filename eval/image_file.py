"""A generated image as a file: lossless, with what made it in its metadata, sealed, and written whole or not at all.

A PNG holds each entry as an ``iTXt`` chunk (UTF-8), a WebP all of them as one JSON object in EXIF's ImageDescription.
The seal is a last chunk with the SHA-256 of every byte before it, so that a file which was cut off or damaged anywhere
is told from a whole one without decoding it: in a PNG an ``iTXt`` named ``excise.sha256`` before ``IEND``, in a WebP a
chunk ``XSHA``. Equal images with equal metadata are equal files, for one version of Pillow.
Source: PNG specification, third edition, 11.3.3; RFC 9649, 2.7.1.6 (unknown chunks).
"""

from __future__ import annotations

import errno
import hashlib
import io
import json
import struct
import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from enum import Enum
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
from PIL import ExifTags, Image
from PIL.PngImagePlugin import PngImageFile, PngInfo

from excise.errors import ArtefactError, OutputError, UsageError
from excise.output import put_in_place

ImageFormat = Literal["png", "webp"]

#: What the keys of the metadata begin with.
PREFIX = "excise."

_SEAL, _CRC32 = f"{PREFIX}sha256", f"{PREFIX}crc32"
_IEND = bytes.fromhex("0000000049454e44ae426082")
_READ = ("PNG", "WEBP")


@dataclass(frozen=True)
class ImageMetadata:
    """What made an image.

    Raises:
        UsageError: a text that UTF-8 can't hold.
    """

    case: str
    prompt: str
    negative_prompt: str
    seed: int
    guidance_scale: float
    num_inference_steps: int
    runtime: str
    edit_id: str | None  #: None where the runtime doesn't say, or has none
    settings: str  #: SHA-256 over all else that the image depends on

    def __post_init__(self) -> None:
        try:
            "".join(map(str, asdict(self).values())).encode()
        except UnicodeEncodeError as error:
            raise UsageError(f"case {self.case}: {self.prompt!a} isn't text: it holds half a character") from error

    def entries(self) -> dict[str, str]:
        """As stored: key → text; an edit that isn't known is the empty text."""
        return {PREFIX + name: "" if value is None else str(value) for name, value in asdict(self).items()}


class ImageState(Enum):
    """What is at an image's place."""

    MISSING = "missing"
    WHOLE = "whole"
    DAMAGED = "damaged"  #: cut off, altered or no image


def encode_image(image: npt.NDArray[np.uint8], metadata: ImageMetadata, image_format: ImageFormat = "png") -> bytes:
    """The file of an image (height, width, 3)."""
    buffer = io.BytesIO()
    entries, opened = metadata.entries(), Image.fromarray(image)
    if image_format == "png":
        info = PngInfo()
        for key, text in entries.items():
            info.add_itxt(key, text)
        opened.save(buffer, "png", pnginfo=info)
        return _sealed_png(buffer.getvalue().removesuffix(_IEND))
    exif = Image.Exif()
    # ASCII, as EXIF wants it, and with a checksum, which a WebP's chunks haven't
    exif[ExifTags.Base.ImageDescription] = json.dumps({**entries, _CRC32: _crc32(entries)})
    opened.save(buffer, "webp", lossless=True, exif=exif)
    return _sealed_webp(buffer.getvalue())


def write_image(path: Path, data: bytes) -> None:
    """Put an image's file at its place in one step, in place of what is there. Its folder exists.

    Raises:
        OutputError: it can't be written, or the disk is full; nothing else is changed.
    """
    try:
        put_in_place(path, data)
    except OSError as error:
        reason = "no space is left on the disk" if error.errno in (errno.ENOSPC, errno.EDQUOT) else error.strerror
        raise OutputError(
            f"{path} can't be written: {reason}; what is done stays: put that right and start again"
        ) from error


def inspect_image(path: Path, metadata: ImageMetadata) -> ImageState:
    """Whether the image at ``path`` is whole and the one that ``metadata`` describes.

    Raises:
        OutputError: it was made from something else, or isn't an image of excise's: neither is ever replaced.
    """
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return ImageState.MISSING
    except OSError as error:
        raise OutputError(f"{path} can't be read: {error.strerror}") from error
    expected, found = metadata.entries(), _entries(data)
    sealed = is_sealed(data)
    if sealed and found == expected:
        return ImageState.WHOLE
    for key in {**expected, **found} if found else ():
        there, here = found.get(key, ""), expected.get(key, "")
        if there != here:
            name = key.removeprefix(PREFIX)
            raise OutputError(
                f"{path} was made with {name} {_short(there)}, and this run has {_short(here)}: choose another "
                "folder, or remove that image"
            )
    ours = any(name in data[-128:] for name in (_SEAL.encode(), b"XSHA"))
    if not found and not ours and _decodes(data):
        raise OutputError(f"{path} is an image that doesn't say what made it: choose another folder, or remove it")
    return ImageState.DAMAGED


def read_image(path: Path) -> npt.NDArray[np.uint8]:
    """The pixels of an image's file, uint8 with shape (height, width, 3).

    Raises:
        ArtefactError: it is missing, or no whole image.
    """
    try:
        with Image.open(path, formats=_READ) as opened:
            return np.asarray(opened.convert("RGB"))
    except Exception as error:  # Pillow's decoders share no base class of errors
        raise ArtefactError(f"{path} can't be read as an image: start the evaluation again to make it anew") from error


def read_entries(path: Path) -> dict[str, str]:
    """An image's metadata, key → text; empty where it has none, or is no image.

    Raises:
        ArtefactError: the file can't be read.
    """
    try:
        return _entries(path.read_bytes())
    except OSError as error:
        raise ArtefactError(f"{path} can't be read: {error.strerror}") from error


def image_size(path: Path) -> tuple[int, int]:
    """(height, width) of a whole image, from its header."""
    with Image.open(path, formats=_READ) as opened:
        return opened.height, opened.width


def is_sealed(data: bytes) -> bool:
    """Whether a file is whole: every byte as it was written."""
    if data.startswith(b"RIFF"):
        body = data[: -len(_xsha(b""))]
        return data == body + _xsha(body)
    body = data[: -len(_itxt_seal(b"") + _IEND)]
    return data == _sealed_png(body)


def _sealed_png(body: bytes) -> bytes:
    return body + _itxt_seal(body) + _IEND


def _itxt_seal(body: bytes) -> bytes:
    # keyword, then: not compressed, no language, no translated keyword
    content = b"iTXt" + _SEAL.encode() + b"\0\0\0\0\0" + hashlib.sha256(body).hexdigest().encode()
    return struct.pack(">I", len(content) - 4) + content + struct.pack(">I", zlib.crc32(content))


def _sealed_webp(data: bytes) -> bytes:
    # the first chunk's length covers the whole file, the seal included
    body = b"RIFF" + struct.pack("<I", len(data) - 8 + len(_xsha(b""))) + data[8:]
    return body + _xsha(body)


def _xsha(body: bytes) -> bytes:
    digest = hashlib.sha256(body).hexdigest().encode()
    return b"XSHA" + struct.pack("<I", len(digest)) + digest


def _entries(data: bytes) -> dict[str, str]:
    """The entries of excise's in a file; none where it is damaged before them, or has none."""
    try:
        with Image.open(io.BytesIO(data), formats=_READ) as opened:
            if isinstance(opened, PngImageFile):
                # those before the pixels, whose checksums Pillow compares
                texts = {str(key): str(text) for key, text in opened.info.items()}
                return {key: text for key, text in texts.items() if key.startswith(PREFIX)}
            entries: dict[str, str] = json.loads(opened.getexif().get(ExifTags.Base.ImageDescription, "{}"))
            return entries if entries.pop(_CRC32, None) == _crc32(entries) else {}
    except Exception:  # Pillow's decoders share no base class of errors
        return {}


def _crc32(entries: Mapping[str, str]) -> str:
    return f"{zlib.crc32(json.dumps(entries).encode()):08x}"


def _decodes(data: bytes) -> bool:
    try:
        with Image.open(io.BytesIO(data)) as opened:
            opened.load()
    except Exception:  # as above
        return False
    return True


def _short(text: str, longest: int = 60) -> str:
    return repr(text if len(text) <= longest else text[: longest - 1] + "…")
