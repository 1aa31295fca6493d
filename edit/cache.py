"""Text embeddings and ``PᵀP`` on disk, so that a second run needs no pass of the text encoder.

An entry is a file named by the SHA-256 of all that decides its content: the text encoder's fingerprint and the prompt,
or, for ``PᵀP`` of many kept prompts (UCE, eq. 3; Gandikota et al., WACV 2024, arXiv 2308.14761), the fingerprint and
every prompt summed so far. It holds the SHA-256 of a safetensors document and then that document: a damaged entry is no
entry. Files appear whole, by a rename, so that several processes may share a folder. Nothing here needs PyTorch.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError
from safetensors.numpy import load, save

from excise.errors import ModelError, UsageError

Array = npt.NDArray[Any]
Float64 = npt.NDArray[np.float64]
Say = Callable[[str], object]

#: Bytes of all entries before the ones that were not read for longest go.
LIMIT = 2 * 10**9

#: Prompts after which a sum of many is written: what a killed run loses at most.
CHUNK = 256
#: Prompts looked up, and passed to the encoder, at a time; and those multiplied at a time, of 5 MB (SD) to 130 (T5).
_BATCH, _PRODUCT = 64, 8

Item = TypeVar("Item")

_ENTRY = re.compile(r"[0-9a-f]{64}\.entry")
_PARTIAL = ".excise-partial-"


def default_folder(say: Say = lambda message: None) -> Path | None:
    """``$EXCISE_CACHE``, or ``excise/embeddings`` in the user's cache folder; without a home None, and a line."""
    try:
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        return Path(os.environ.get("EXCISE_CACHE") or Path(base) / "excise" / "embeddings")
    except RuntimeError:
        say("embeddings aren't cached: there is no home folder; set EXCISE_CACHE to a folder")
        return None


def key_of(*parts: str) -> str:
    """SHA-256 of ``parts``; no other parts have the same text in a row."""
    digest = hashlib.sha256()
    for part in parts:
        content = part.encode("utf-8", "surrogatepass")
        digest.update(len(content).to_bytes(8, "little") + content)
    return digest.hexdigest()


class EmbeddingCache:
    """Named arrays by key. It is never in the way: what can't be read is a miss, what can't be written is said once."""

    def __init__(self, folder: Path | None, limit_bytes: int = LIMIT, *, say: Say = lambda message: None) -> None:
        """``folder`` None is no cache; ``say`` is told once if nothing can be written."""
        self.folder, self.limit_bytes = folder, limit_bytes
        self._say, self._writable = say, folder is not None
        # Bytes of all entries, known after the first look at the folder; other processes' show at the next one.
        self._size: int | None = None

    def get(self, key: str) -> dict[str, Array] | None:
        """The arrays of ``key``; None where there are none, or damaged ones, which are deleted."""
        if self.folder is None:
            return None
        path = self.folder / key[:2] / f"{key}.entry"
        try:
            content = path.read_bytes()
        except OSError:
            return None
        try:
            if hashlib.sha256(content[32:]).digest() != content[:32]:
                raise ValueError("damaged")
            arrays = {name: np.array(array) for name, array in load(content[32:]).items()}
        except (SafetensorError, ValueError):
            self.delete(key)
            return None
        with contextlib.suppress(OSError):
            # When it was last read: file systems don't record that by themselves.
            os.utime(path)
        return arrays

    def put(self, key: str, arrays: Mapping[str, Array]) -> bool:
        """Write the arrays of ``key``; over the limit, the entries not read for longest go. Whether it was written."""
        if self.folder is None or not self._writable:
            return False
        document = save({name: np.ascontiguousarray(array) for name, array in arrays.items()})
        path = self.folder / key[:2] / f"{key}.entry"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            handle, partial = tempfile.mkstemp(prefix=_PARTIAL, dir=path.parent)
            try:
                with os.fdopen(handle, "wb") as file:
                    file.write(hashlib.sha256(document).digest() + document)
                os.replace(partial, path)
            except BaseException:
                Path(partial).unlink(missing_ok=True)
                raise
        except OSError as error:
            self._writable = False
            self._say(f"embeddings aren't cached: {self.folder} can't be written ({error.strerror or error})")
            return False
        self._size = None if self._size is None else self._size + len(document) + 32
        if self._size is None or self._size > self.limit_bytes:
            self._shrink(self.folder)
        return True

    def delete(self, key: str) -> None:
        """Remove the entry of ``key``, if there is one."""
        with contextlib.suppress(OSError):
            if self.folder is not None:
                path = self.folder / key[:2] / f"{key}.entry"
                size = path.stat().st_size
                path.unlink()
                self._size = None if self._size is None else self._size - size

    def _shrink(self, folder: Path) -> None:
        """Measure the folder; over the limit, delete to nine tenths of it. Only the cache's own names are touched."""
        entries: list[tuple[float, int, Path]] = []
        for path in folder.glob("[0-9a-f][0-9a-f]/*"):
            with contextlib.suppress(OSError):
                status = path.stat()
                if _ENTRY.fullmatch(path.name):
                    entries.append((status.st_mtime, status.st_size, path))
                elif path.name.startswith(_PARTIAL) and status.st_mtime < time.time() - 3600:
                    # Left by a process that was killed.
                    path.unlink()
        self._size = sum(size for _, size, _ in entries)
        if self._size > self.limit_bytes:
            for _, _, path in sorted(entries):
                if self._size > 0.9 * self.limit_bytes:
                    self.delete(path.stem)


S = TypeVar("S")
S_co = TypeVar("S_co", covariant=True)


class Encoder(Protocol[S_co]):
    """What turns prompts into the segments of each stream, in order.

    A segment has ``tokens`` with shape (t, d), ``length``, the number of the prompt's own, and ``start``, those of them
    that come before its words.
    """

    def embed(self, prompts: Sequence[str], /) -> Iterator[Mapping[str, tuple[S_co, ...]]]: ...


@dataclass(frozen=True)
class KeptGram:
    """``PᵀP`` with shape (d, d), float64, of each stream, over every token of ``count`` prompts; none without any."""

    streams: Mapping[str, Float64]
    count: int


class CachedEncoder(Generic[S]):
    """An encoder that is built when the first prompt isn't in the cache.

    Embeddings are float32, cached or not: both ways give the same numbers.
    """

    def __init__(
        self,
        build: Callable[[], Encoder[S]],
        fingerprint: str,
        cache: EmbeddingCache,
        make: Callable[[npt.NDArray[np.float32], int, int], S],
        *,
        settings: str = "",
        unchanged: Callable[[], bool] = lambda: True,
    ) -> None:
        """``build`` makes the encoder, whose fingerprint is known without it, and ``make`` a segment from its parts.

        ``settings`` is what else decides an embedding, such as the tokenizer and a token limit. ``unchanged`` is asked
        before anything new is used or stored: whether the files are still those of the fingerprint.
        """
        self.fingerprint, self._unchanged = fingerprint, unchanged
        self._build, self._cache, self._make, self._settings = build, cache, make, settings
        self._built: Encoder[S] | None = None

    def embed(self, prompts: Iterable[str]) -> Iterator[dict[str, tuple[S, ...]]]:
        """Each prompt's segments by stream, in order; a prompt is stored as soon as it is encoded.

        Raises:
            ModelError: the encoder's files aren't those that the fingerprint was taken of.
            PromptTooLong: as the encoder does.
        """
        for batch in batched(prompts, _BATCH):
            found = {prompt: self._cache.get(self._key("embedding 2", prompt)) for prompt in dict.fromkeys(batch)}
            missing = [prompt for prompt, arrays in found.items() if arrays is None]
            if missing:
                for prompt, streams in zip(missing, self._encoded(missing), strict=True):
                    found[prompt] = arrays = _arrays(streams)
                    self._cache.put(self._key("embedding 2", prompt), arrays)
            for prompt in batch:
                yield self._streams(found[prompt] or {})

    def kept_gram(self, read: Callable[[], Iterable[str]]) -> KeptGram:
        """``PᵀP`` of many prompts, written every ``CHUNK``: a run that was killed goes on where it was.

        Memory is O(d²) for any number of prompts. On disk stay the sum of the whole list and that of its whole chunks,
        from which a longer list goes on; single embeddings aren't stored.

        ``read`` gives the prompts from the first on, each time that it is called.

        Raises:
            UsageError: they aren't the same the second time; otherwise as ``embed``.
        """
        keys = [key for key, _ in self._chunks(read())]
        done, sums = next(
            ((n, found) for n in range(len(keys), 0, -1) if (found := self._cache.get(keys[n - 1])) is not None),
            (0, {}),
        )
        count = number = 0
        for number, (key, chunk) in enumerate(self._chunks(read()), 1):
            if keys[number - 1 : number] != [key]:
                break
            count += len(chunk)
            if number <= done:
                continue
            for name, gram in _gram(self._encoded(chunk)).items():
                sums[name] = sums.get(name, 0.0) + gram
            if self._cache.put(key, sums) and number > done + 1 and len(chunk) == CHUNK:
                self._cache.delete(keys[number - 2])
        else:
            if number == len(keys):
                return KeptGram(sums, count)
        raise UsageError("the prompts to keep changed while they were read: run it again")

    def _chunks(self, prompts: Iterable[str]) -> Iterator[tuple[str, tuple[str, ...]]]:
        """Some prompts at a time, and the key of the sum up to there."""
        key = ""
        for chunk in batched(prompts, CHUNK):
            key = self._key("gram 1", key, *chunk)
            yield key, chunk

    def _encoded(self, prompts: Sequence[str]) -> Iterator[Mapping[str, tuple[S, ...]]]:
        self._built = self._built or self._build()
        for streams in self._built.embed(prompts):
            if not self._unchanged():
                raise ModelError("the text encoder's files changed while they were read: run it again")
            yield streams

    def _key(self, *parts: str) -> str:
        return key_of(parts[0], self.fingerprint, self._settings, *parts[1:])

    def _streams(self, arrays: Mapping[str, Array]) -> dict[str, tuple[S, ...]]:
        return {
            name.removeprefix("spans."): tuple(
                self._make(arrays[name.replace("spans", f"tokens.{index}", 1)].copy(), int(length), int(start))
                for index, (length, start) in enumerate(spans)
            )
            for name, spans in arrays.items()
            if name.startswith("spans.")
        }


def _arrays(streams: Mapping[str, tuple[Any, ...]]) -> dict[str, Array]:
    arrays: dict[str, Array] = {}
    for name, parts in streams.items():
        arrays[f"spans.{name}"] = np.array([(part.length, part.start) for part in parts], dtype=np.int64)
        arrays |= {f"tokens.{n}.{name}": np.asarray(part.tokens, dtype=np.float32) for n, part in enumerate(parts)}
    return arrays


def _gram(embeddings: Iterable[Mapping[str, tuple[Any, ...]]]) -> dict[str, Float64]:
    """``PᵀP`` of each stream; P is the float32 tokens."""
    sums: dict[str, Float64] = {}
    for batch in batched(embeddings, _PRODUCT):
        rows: dict[str, list[Array]] = {}
        for streams in batch:
            for name, segments in streams.items():
                rows.setdefault(name, []).extend(np.asarray(part.tokens, dtype=np.float32) for part in segments)
        for name, parts in rows.items():
            tokens = np.concatenate(parts).astype(np.float64)
            sums[name] = sums.get(name, 0.0) + tokens.T @ tokens
    return sums


def batched(items: Iterable[Item], size: int) -> Iterator[tuple[Item, ...]]:
    """As ``itertools.batched``, which Python 3.11 lacks."""
    remaining = iter(items)
    while batch := tuple(islice(remaining, size)):
        yield batch
