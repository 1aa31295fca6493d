"""What networks see in an evaluation's images, kept in blocks, so that a run that was ended looks at no image twice.

A block belongs to the images' content and the network's fingerprint: one that was made of others is made again, and so
is one that isn't as it was written, which the SHA-256 in its first line tells.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
from safetensors.numpy import load, save
from tqdm import tqdm

from excise.errors import ModelError, OutputError
from excise.eval.feature_extractor import FeatureExtractor, Fingerprint
from excise.eval.image_detector import ImageDetector
from excise.eval.image_file import read_image, write_image
from excise.manifest import hash_file

#: Images of a block.
BLOCK = 128

Seen = TypeVar("Seen")


class Pictures(Sequence[npt.NDArray[np.uint8]]):
    """Images in files, uint8 with shape (height, width, 3), each read when it is asked for."""

    def __init__(self, files: Sequence[Path]) -> None:
        self.files = tuple(files)

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: Any) -> Any:
        return Pictures(self.files[index]) if isinstance(index, slice) else read_image(self.files[index])

    def digests(self) -> tuple[str, ...]:
        """SHA-256 of every file."""
        return tuple(hash_file(file) for file in self.files)


def observations(
    folder: Path, detector: ImageDetector, pictures: Pictures, digests: Sequence[str], *, about: str, progress: bool
) -> list[dict[str, Any]]:
    """``detector.observe`` of all pictures; ``about`` names whose they are in the progress bar.

    Raises:
        OutputError: the folder can't be written.
        ModelError: the network doesn't give one answer an image.
    """

    def decode(content: bytes, count: int) -> list[dict[str, Any]] | None:
        found = json.loads(content)
        return found if isinstance(found, list) and len(found) == count else None

    blocks = _blocks(
        folder / "observations",
        detector.fingerprint,
        pictures,
        digests,
        look=lambda block: detector.observe(block),
        encode=lambda seen: json.dumps(seen).encode(),
        decode=decode,
        bar=f"{about}: {detector.name}" if progress else None,
    )
    return [one for block in blocks for one in block]


def features(
    folder: Path, extractor: FeatureExtractor, pictures: Pictures, digests: Sequence[str], *, about: str, progress: bool
) -> npt.NDArray[np.float32]:
    """``extractor.image_features`` of all pictures, float32 with shape (n, d).

    Raises:
        OutputError: the folder can't be written.
        ModelError: the network doesn't give one answer an image.
    """

    def decode(content: bytes, count: int) -> npt.NDArray[np.float32] | None:
        found: npt.NDArray[np.float32] = load(content)["features"]
        return found if found.shape == (count, extractor.dimension) and found.dtype == np.float32 else None

    blocks = _blocks(
        folder / "features",
        extractor.fingerprint,
        pictures,
        digests,
        look=lambda block: extractor.image_features(block),
        encode=lambda rows: save({"features": np.ascontiguousarray(rows, np.float32)}),
        decode=decode,
        bar=f"{about}: {extractor.name}" if progress else None,
    )
    return np.concatenate([np.zeros((0, extractor.dimension), np.float32), *blocks])


def _blocks(
    folder: Path,
    fingerprint: Fingerprint,
    pictures: Pictures,
    digests: Sequence[str],
    *,
    look: Callable[[Pictures], Seen],
    encode: Callable[[Seen], bytes],
    decode: Callable[[bytes, int], Seen | None],
    bar: str | None,
) -> Iterator[Seen]:
    network = hashlib.sha256(fingerprint.model_dump_json().encode()).hexdigest()
    place = folder / network[:16]
    _made(place)
    with tqdm(total=len(pictures), desc=bar, unit="image", file=sys.stderr, disable=bar is None) as shown:
        for start in range(0, len(pictures), BLOCK):
            chosen = slice(start, start + BLOCK)
            count = len(digests[chosen])
            key = hashlib.sha256("\n".join((network, *digests[chosen])).encode()).hexdigest()
            file = place / f"{start // BLOCK:05d}-{key[:24]}"
            seen = _kept(file, decode, count)
            if seen is None:
                content = encode(look(pictures[chosen]))
                # What a later run reads back is what this one goes on with.
                seen = decode(content, count)
                if seen is None:
                    raise ModelError(f"{fingerprint.name} gave something else than one answer an image")
                write_image(file, _digest(content) + content)
            shown.update(count)
            yield seen


def _made(place: Path) -> None:
    try:
        place.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{place} can't be made: {error.strerror}") from error


def _kept(file: Path, decode: Callable[[bytes, int], Seen | None], count: int) -> Seen | None:
    """A block that was written before; what can't be read, or is damaged, is no block."""
    try:
        written = file.read_bytes()
    except OSError:
        return None
    content = written[len(_digest(b"")) :]
    return decode(content, count) if written == _digest(content) + content else None


def _digest(content: bytes) -> bytes:
    return hashlib.sha256(content).hexdigest().encode() + b"\n"
