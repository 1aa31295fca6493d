"""Statistics on disk: read back whole, refused where they are another extractor's, damaged or foreign."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from excise.errors import ArtefactError, OutputError
from excise.eval.feature_extractor import Fingerprint
from excise.eval.feature_statistics import FeatureStatistics, StatisticsFitter
from excise.eval.statistics_file import load_statistics, save_statistics

FINGERPRINT = Fingerprint(name="random", weights="0" * 64, preprocessing="none")


@pytest.fixture
def statistics() -> FeatureStatistics:
    fitter = StatisticsFitter(FINGERPRINT, 4, exponent=-14)
    fitter.add(np.random.default_rng(0).standard_normal((30, 4)))
    return fitter.statistics()


def test_statistics_are_read_back_whole(tmp_path: Path, statistics: FeatureStatistics) -> None:
    save_statistics(tmp_path / "a.safetensors", statistics)
    read = load_statistics(tmp_path / "a.safetensors", FINGERPRINT)
    assert (read.count, read.exponent, read.fingerprint) == (30, -14, FINGERPRINT)
    assert np.array_equal(read.total, statistics.total)
    assert np.array_equal(read.outer, statistics.outer)
    assert (read + statistics).count == 60


def test_equal_statistics_are_equal_files(tmp_path: Path, statistics: FeatureStatistics) -> None:
    rows = np.random.default_rng(0).standard_normal((30, 4))
    shards = []
    for shard in (rows[20:], rows[:20]):
        fitter = StatisticsFitter(FINGERPRINT, 4, exponent=-14)
        fitter.add(shard)
        shards.append(fitter.statistics())
    save_statistics(tmp_path / "whole.safetensors", statistics)
    save_statistics(tmp_path / "shards.safetensors", shards[0] + shards[1])
    assert (tmp_path / "whole.safetensors").read_bytes() == (tmp_path / "shards.safetensors").read_bytes()


def test_nothing_is_overwritten(tmp_path: Path, statistics: FeatureStatistics) -> None:
    save_statistics(tmp_path / "a.safetensors", statistics)
    with pytest.raises(OutputError, match="exists already"):
        save_statistics(tmp_path / "a.safetensors", statistics)


@pytest.mark.parametrize("field", ["name", "weights", "preprocessing"])
def test_another_extractors_are_refused(tmp_path: Path, statistics: FeatureStatistics, field: str) -> None:
    save_statistics(tmp_path / "a.safetensors", statistics)
    with pytest.raises(ArtefactError, match=f"another feature extractor, with {field} "):
        load_statistics(tmp_path / "a.safetensors", FINGERPRINT.model_copy(update={field: "1" * 64}))
    assert load_statistics(tmp_path / "a.safetensors").count == 30


def test_other_files_are_refused(tmp_path: Path, statistics: FeatureStatistics) -> None:
    with pytest.raises(ArtefactError, match="can't be read as feature statistics"):
        load_statistics(tmp_path / "missing.safetensors")
    (tmp_path / "text.safetensors").write_text("not tensors")
    with pytest.raises(ArtefactError, match="can't be read as feature statistics"):
        load_statistics(tmp_path / "text.safetensors")
    save_file({"total": statistics.total}, tmp_path / "foreign.safetensors")
    with pytest.raises(ArtefactError, match="has no feature statistics"):
        load_statistics(tmp_path / "foreign.safetensors")
    save_statistics(tmp_path / "whole.safetensors", statistics)
    content = (tmp_path / "whole.safetensors").read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(content[:-8])
    with pytest.raises(ArtefactError, match="can't be read as feature statistics"):
        load_statistics(tmp_path / "cut.safetensors")


@pytest.mark.parametrize(
    ("change", "complaint"),
    [({"format": 2}, "format 1: format"), ({"count": -1}, "count"), ({"more": 1}, "more"), ({}, "damaged")],
)
def test_altered_files_are_refused(
    tmp_path: Path, statistics: FeatureStatistics, change: dict[str, int], complaint: str
) -> None:
    save_statistics(tmp_path / "a.safetensors", statistics)
    document = {
        "format": 1,
        "count": 30,
        "exponent": -14,
        "fingerprint": FINGERPRINT.model_dump(),
    } | change
    tensors = load_file(tmp_path / "a.safetensors")
    if not change:
        tensors["outer"] = tensors["outer"].astype(np.float64)
    save_file(tensors, tmp_path / "b.safetensors", {"excise_statistics": json.dumps(document)})
    with pytest.raises(ArtefactError, match=complaint):
        load_statistics(tmp_path / "b.safetensors")
