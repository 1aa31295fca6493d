"""A second run needs no encoder and gives the same numbers, whatever happened to the files in between."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import tempfile
import tracemalloc
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from excise.edit.cache import CHUNK, Array, CachedEncoder, EmbeddingCache, KeptGram, default_folder, key_of
from excise.errors import ModelError, UsageError

D = 6


@dataclass(frozen=True)
class Part:
    """A segment as an encoder puts it out, in float64."""

    tokens: npt.NDArray[np.floating]
    length: int
    start: int


class Fake:
    """Two streams, one of two segments; counts what it encodes, and dies when told to."""

    def __init__(self, dies_at: int | None = None) -> None:
        self.built, self.encoded, self.dies_at = 0, list[str](), dies_at

    def __call__(self) -> Fake:
        self.built += 1
        return self

    def embed(self, prompts: Sequence[str], /) -> Iterator[Mapping[str, tuple[Part, ...]]]:
        for prompt in prompts:
            if len(self.encoded) == self.dies_at:
                raise KeyboardInterrupt
            self.encoded.append(prompt)
            yield fake_streams(prompt)


def fake_streams(prompt: str) -> dict[str, tuple[Part, ...]]:
    random = np.random.default_rng(list(prompt.encode("utf-8", "surrogatepass")))
    parts = [Part(random.standard_normal((rows, D)), rows - 1, rows // 4) for rows in (4, 2, 1)]
    return {"text.x": (parts[0], parts[1]), "pooled": (parts[2],)}


def cached(fake: Fake, cache: EmbeddingCache, **options: Any) -> CachedEncoder[Part]:
    return CachedEncoder(fake, "f", cache, Part, **options)


def same(found: Mapping[str, tuple[Part, ...]], prompt: str) -> bool:
    """Exactly the float32 values, and what is said of them."""
    expected = fake_streams(prompt)
    assert found.keys() == expected.keys()
    for name, parts in expected.items():
        assert [(part.length, part.start) for part in found[name]] == [(part.length, part.start) for part in parts]
        for got, part in zip(found[name], parts, strict=True):
            assert got.tokens.dtype == np.float32
            assert got.tokens.flags.writeable
            np.testing.assert_array_equal(got.tokens, part.tokens.astype(np.float32))
    return True


def entries(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def numbered(count: int) -> list[str]:
    return [f"caption {number}" for number in range(count)]


# Embeddings.


def test_a_second_run_builds_no_encoder(tmp_path: Path) -> None:
    prompts = ["cat", "dog", "cat", "", " ", "𝕏\n\0"]
    first, second = Fake(), Fake()
    for fake in (first, second):
        found = list(cached(fake, EmbeddingCache(tmp_path)).embed(prompts))
        assert all(same(streams, prompt) for streams, prompt in zip(found, prompts, strict=True))
    assert (first.built, first.encoded) == (1, ["cat", "dog", "", " ", "𝕏\n\0"])
    assert (second.built, second.encoded) == (0, [])


@settings(deadline=None, max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(prompts=st.lists(st.text(max_size=8), max_size=8))
def test_any_prompts_come_back_in_order(tmp_path: Path, prompts: list[str]) -> None:
    found = list(cached(Fake(), EmbeddingCache(tmp_path)).embed(iter(prompts)))
    assert all(same(streams, prompt) for streams, prompt in zip(found, prompts, strict=True))


def test_without_a_folder_each_run_encodes_and_gives_the_same(tmp_path: Path) -> None:
    fake = Fake()
    encoder = cached(fake, EmbeddingCache(None))
    assert all(same(streams, "cat") for _ in range(2) for streams in encoder.embed(["cat", "cat"]))
    assert (fake.built, fake.encoded) == (1, ["cat", "cat"])


def test_another_encoder_or_another_setting_is_a_miss(tmp_path: Path) -> None:
    cache = EmbeddingCache(tmp_path)
    list(cached(Fake(), cache).embed(["cat"]))
    limited = Fake()
    list(cached(limited, cache, settings="limit 12").embed(["cat"]))
    assert limited.encoded == ["cat"]
    other = Fake()
    list(CachedEncoder(other, "g", cache, Part).embed(["cat"]))
    assert other.encoded == ["cat"]


def test_what_an_encoder_made_of_changed_files_is_neither_used_nor_stored(tmp_path: Path) -> None:
    cache, fake = EmbeddingCache(tmp_path), Fake()
    encoder = cached(fake, cache, unchanged=lambda: len(fake.encoded) < 3)
    found = encoder.embed(["cat", "dog", "owl"])
    with pytest.raises(ModelError, match="changed while they were read: run it again"):
        list(found)
    assert len(entries(tmp_path)) == 2
    with pytest.raises(ModelError, match="changed while they were read"):
        encoder.kept_gram(lambda: numbered(2))
    assert len(entries(tmp_path)) == 2
    # What was made before is there, and needs no encoder.
    assert all(
        same(streams, prompt) for streams, prompt in zip(encoder.embed(["cat", "dog"]), ["cat", "dog"], strict=True)
    )


def test_keys_tell_parts_apart() -> None:
    keys = [key_of(*parts) for parts in (("ab", "c"), ("a", "bc"), ("abc",), ("abc", ""), ("", "abc"), ())]
    assert len(set(keys)) == len(keys)


def test_a_killed_run_keeps_what_it_encoded(tmp_path: Path) -> None:
    prompts = numbered(100)
    with pytest.raises(KeyboardInterrupt):
        list(cached(Fake(dies_at=77), EmbeddingCache(tmp_path)).embed(prompts))
    second = Fake()
    found = list(cached(second, EmbeddingCache(tmp_path)).embed(prompts))
    assert second.encoded == prompts[77:]
    assert all(same(streams, prompt) for streams, prompt in zip(found, prompts, strict=True))


def damage(path: Path, kind: str) -> None:
    content = bytearray(path.read_bytes())
    if kind == "truncated":
        del content[len(content) // 2 :]
    elif kind == "empty":
        content.clear()
    elif kind == "one bit":
        content[-3] ^= 1
    else:
        content[:] = bytes(len(content))
    path.write_bytes(content)


@pytest.mark.parametrize("kind", ["truncated", "empty", "one bit", "zeros"])
def test_a_damaged_entry_is_a_miss_and_made_anew(tmp_path: Path, kind: str) -> None:
    list(cached(Fake(), EmbeddingCache(tmp_path)).embed(["cat", "dog"]))
    damage(entries(tmp_path)[0], kind)
    again, last = Fake(), Fake()
    for fake in (again, last):
        found = list(cached(fake, EmbeddingCache(tmp_path)).embed(["cat", "dog"]))
        assert all(same(streams, prompt) for streams, prompt in zip(found, ["cat", "dog"], strict=True))
    assert (len(again.encoded), len(last.encoded)) == (1, 0)
    damage(path := entries(tmp_path)[0], kind)
    assert EmbeddingCache(tmp_path).get(path.stem) is None
    assert not path.exists()


# The folder.


def arrays(value: float = 0.0) -> dict[str, Array]:
    return {"x": np.full(250, value)}


def test_what_was_not_read_for_longest_goes_first(tmp_path: Path) -> None:
    cache = EmbeddingCache(tmp_path, 25_000)
    mine = tmp_path / "00" / "notes.txt"
    mine.parent.mkdir()
    mine.write_text("x" * 10_000)
    names = [key_of(str(number)) for number in range(11)]
    for age, name in enumerate(names[:10]):
        cache.put(name, arrays(age))
        path = tmp_path / name[:2] / f"{name}.entry"
        os.utime(path, (1000 + age, 1000 + age))
    size = path.stat().st_size
    assert cache.get(names[0]) is not None
    # A tenth is free after the eleventh, by the entries 1, 2, … that were read before it.
    cache.limit_bytes = 10 * size
    cache.put(names[10], arrays())
    left = [name for name in names if EmbeddingCache(tmp_path).get(name) is not None]
    assert left == [names[0], *names[3:]]
    assert mine.exists()


def test_the_size_stays_under_the_limit(tmp_path: Path) -> None:
    """Of several processes' entries too, from the first entry that one writes."""
    for number in range(30):
        EmbeddingCache(tmp_path).put(key_of("before", str(number)), arrays())
    cache = EmbeddingCache(tmp_path, 20_000)
    for number in range(30):
        cache.put(key_of(str(number)), arrays())
        assert sum(path.stat().st_size for path in entries(tmp_path)) <= 20_000


def test_only_old_leftovers_of_killed_processes_are_removed(tmp_path: Path) -> None:
    old, new = (tmp_path / "ab" / f".excise-partial-{name}" for name in ("old", "new"))
    old.parent.mkdir()
    for path in (old, new):
        path.write_bytes(b"x")
    os.utime(old, (0, 0))
    EmbeddingCache(tmp_path).put(key_of(), arrays())
    assert (old.exists(), new.exists()) == (False, True)


def test_a_folder_that_cannot_be_written_is_said_once(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    said: list[str] = []
    cache = EmbeddingCache(tmp_path / "file" / "cache", say=said.append)
    found = list(cached(Fake(), cache).embed(["cat", "dog"]))
    assert same(found[1], "dog")
    assert len(said) == 1
    assert said[0].startswith(f"embeddings aren't cached: {tmp_path / 'file' / 'cache'} can't be written (")


def test_a_full_disk_leaves_nothing_half_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(source: object, target: object) -> None:
        raise OSError(28, "No space left on device")

    said: list[str] = []
    monkeypatch.setattr(os, "replace", full)
    cache = EmbeddingCache(tmp_path, say=said.append)
    assert not cache.put(key_of(), arrays())
    assert not entries(tmp_path)
    assert "No space left on device" in said[0]


def test_a_read_only_cache_still_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def read_only(*arguments: object, **options: object) -> None:
        raise OSError(30, "Read-only file system")

    list(cached(Fake(), EmbeddingCache(tmp_path)).embed(["cat"]))
    for module, name in ((os, "utime"), (os, "unlink"), (tempfile, "mkstemp")):
        monkeypatch.setattr(module, name, read_only)
    said: list[str] = []
    fake = Fake()
    list(cached(fake, EmbeddingCache(tmp_path, say=said.append)).embed(["cat", "dog", "owl"]))
    assert (fake.encoded, len(said)) == (["dog", "owl"], 1)
    assert "Read-only file system" in said[0]


def test_the_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("EXCISE_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", lambda: Path("/home/me"))
    assert default_folder() == Path("/home/me/.cache/excise/embeddings")
    monkeypatch.setattr(Path, "home", homeless)
    said: list[str] = []
    assert default_folder(said.append) is None
    assert said == ["embeddings aren't cached: there is no home folder; set EXCISE_CACHE to a folder"]
    monkeypatch.setenv("XDG_CACHE_HOME", "/cache")
    assert default_folder() == Path("/cache/excise/embeddings")
    monkeypatch.setenv("EXCISE_CACHE", "/mine")
    assert default_folder() == Path("/mine")


def _hammer(folder: Path, seed: int) -> None:
    """Read and write the same few keys, in a folder too small for them, and check every answer."""
    cache = EmbeddingCache(folder, 12_000)
    for number in np.random.default_rng(seed).integers(0, 12, 400):
        name = key_of(str(number))
        if (found := cache.get(name)) is None:
            cache.put(name, arrays(number))
        else:
            assert (found["x"] == number).all()


def test_processes_share_a_folder(tmp_path: Path) -> None:
    processes = [multiprocessing.get_context("spawn").Process(target=_hammer, args=(tmp_path, n)) for n in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert all(path.suffix == ".entry" for path in entries(tmp_path))
    assert all(EmbeddingCache(tmp_path).get(path.stem) is not None for path in entries(tmp_path))


# PᵀP.


def explicit(prompts: Sequence[str]) -> dict[str, npt.NDArray[np.float64]]:
    """From all rows at once."""
    rows: dict[str, list[Array]] = {"text.x": [], "pooled": []}
    for prompt in prompts:
        for name, parts in fake_streams(prompt).items():
            rows[name] += [part.tokens.astype(np.float32).astype(np.float64) for part in parts]
    stacked = {name: np.concatenate(parts) for name, parts in rows.items()}
    return {name: p.T @ p for name, p in stacked.items()}


def equal(first: KeptGram, second: KeptGram) -> bool:
    """To the last bit."""
    for name in first.streams.keys() | second.streams.keys():
        np.testing.assert_array_equal(first.streams[name], second.streams[name])
        assert first.streams[name].flags.writeable
    return first.count == second.count


@pytest.mark.parametrize("count", [1, CHUNK, 2 * CHUNK + 3])
def test_the_sum_is_that_of_all_rows_and_is_kept(tmp_path: Path, count: int) -> None:
    prompts = numbered(count)
    first, second = Fake(), Fake()
    gram = cached(first, EmbeddingCache(tmp_path)).kept_gram(lambda: prompts)
    assert (gram.count, first.encoded) == (count, prompts)
    for name, expected in explicit(prompts).items():
        # Measured: 1.4e-15 at worst.
        np.testing.assert_allclose(gram.streams[name], expected, rtol=0, atol=1e-14 * np.abs(expected).max())
    assert equal(cached(second, EmbeddingCache(tmp_path)).kept_gram(lambda: prompts), gram)
    assert equal(cached(Fake(), EmbeddingCache(None)).kept_gram(lambda: prompts), gram)
    assert second.built == 0
    # Of the whole list, and of its whole chunks.
    assert len(entries(tmp_path)) == (2 if count > CHUNK else 1)


def test_a_killed_sum_goes_on_where_it_was(tmp_path: Path) -> None:
    prompts = numbered(4 * CHUNK)
    with pytest.raises(KeyboardInterrupt):
        cached(Fake(dies_at=3 * CHUNK - 1), EmbeddingCache(tmp_path)).kept_gram(lambda: prompts)
    second = Fake()
    gram = cached(second, EmbeddingCache(tmp_path)).kept_gram(lambda: prompts)
    assert second.encoded == prompts[2 * CHUNK :]
    assert equal(gram, cached(Fake(), EmbeddingCache(None)).kept_gram(lambda: prompts))


def test_a_longer_list_starts_from_the_shorter_one(tmp_path: Path) -> None:
    prompts = numbered(2 * CHUNK + 10)
    cached(Fake(), EmbeddingCache(tmp_path)).kept_gram(lambda: prompts[: CHUNK + 5])
    second = Fake()
    gram = cached(second, EmbeddingCache(tmp_path)).kept_gram(lambda: prompts)
    assert second.encoded == prompts[CHUNK:]
    assert equal(gram, cached(Fake(), EmbeddingCache(None)).kept_gram(lambda: prompts))
    third = Fake()
    cached(third, EmbeddingCache(tmp_path)).kept_gram(lambda: prompts[: CHUNK + 5])
    assert third.built == 0


def test_another_order_is_another_list(tmp_path: Path) -> None:
    prompts = numbered(CHUNK + 1)
    cached(Fake(), EmbeddingCache(tmp_path)).kept_gram(lambda: prompts)
    second = Fake()
    cached(second, EmbeddingCache(tmp_path)).kept_gram(lambda: prompts[::-1])
    assert len(second.encoded) == CHUNK + 1


def test_a_damaged_sum_is_made_from_the_one_before(tmp_path: Path) -> None:
    prompts = numbered(CHUNK + 1)
    gram = cached(Fake(), EmbeddingCache(tmp_path)).kept_gram(lambda: prompts)
    newest = max(entries(tmp_path), key=lambda path: path.stat().st_mtime_ns)
    damage(newest, "one bit")
    second = Fake()
    assert equal(cached(second, EmbeddingCache(tmp_path)).kept_gram(lambda: prompts), gram)
    assert second.encoded == prompts[CHUNK:]


def test_prompts_that_change_are_refused(tmp_path: Path) -> None:
    once = iter(numbered(3))
    for lists in ([numbered(3), numbered(4)], [numbered(600), numbered(500)], [numbered(300), []]):
        reads = iter(lists)
        with pytest.raises(UsageError, match="changed while they were read"):
            cached(Fake(), EmbeddingCache(tmp_path)).kept_gram(lambda reads=reads: next(reads))  # type: ignore[misc]
    with pytest.raises(UsageError, match="changed while they were read"):
        cached(Fake(), EmbeddingCache(tmp_path)).kept_gram(lambda: once)
    assert cached(Fake(), EmbeddingCache(tmp_path)).kept_gram(list) == KeptGram({}, 0)


def test_memory_does_not_grow_with_the_list(tmp_path: Path) -> None:
    streams = fake_streams("one for all")

    class Forgetful(Fake):
        def embed(self, prompts: Sequence[str], /) -> Iterator[Mapping[str, tuple[Part, ...]]]:
            return (streams for _ in prompts)

    def peak(count: int) -> int:
        encoder = cached(Forgetful(), EmbeddingCache(tmp_path / str(count)))
        tracemalloc.start()
        try:
            encoder.kept_gram(lambda: (f"{number}" for number in range(count * CHUNK)))
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    peak(1)
    few, many = peak(4), peak(32)
    # Measured: 57 kB and 136 kB; CPython keeps up to 208 kB of freed tuples. The prompts alone are 0.4 MB.
    assert many < few + 250_000


def test_no_pytorch_is_needed() -> None:
    code = "import sys, excise.edit.cache, excise.edit.recipe; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
