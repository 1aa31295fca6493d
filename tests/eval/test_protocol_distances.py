"""Distances of two runtimes' images, against direct calls of the metrics, in the groups that were asked for."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from excise.eval import bootstrap
from excise.eval.cases import Case
from excise.eval.distance_bootstrap import distance
from excise.eval.image_file import ImageMetadata, encode_image
from excise.eval.observation_cache import Pictures
from excise.eval.perceptual import TRUNK, Lpips, psnr
from excise.eval.permutation import mmd_p_value
from excise.eval.pixel_movement import movements
from excise.eval.protocol_distances import apart, difference, features_p_value
from excise.eval.protocol_models import ProtocolModels
from excise.eval.protocol_schema import Metric
from excise.eval.run_images import RunImages
from tests.eval.evaluated_runs import Clip

COUNT, ERASED = 10, 4


def run(folder: Path, seed: int, *, size: int = 8, equal: int = 0, grow: int = 0) -> RunImages:
    """Drawn images; the first ``equal`` ones are the same whatever the seed, and each ``grow`` wider than the last."""
    folder.mkdir()
    cases, files = [], []
    for row in range(COUNT):
        group, sides = "erased" if row < ERASED else "kept", (size, size + grow * row)
        asked = {"height": sides[0], "width": sides[1]} if grow else {}
        cases.append(Case(str(row), f"a cat {row}", row, 5.0, group, **asked))  # type: ignore[arg-type]
        random = np.random.default_rng([row, 0 if row < equal else seed])
        image = random.integers(0, 256, (*sides, 3), np.uint8) // (1 + row % 3)
        files.append(folder / f"{row}.png")
        files[-1].write_bytes(
            encode_image(image, ImageMetadata(str(row), "", "", 0, 1.0, 1, folder.name, None, "0" * 64))
        )
    return RunImages(folder.name, cases, Pictures(files), folder / "seen", progress=False)


@pytest.fixture
def models() -> ProtocolModels:
    return ProtocolModels({}, _opened={"clip demo:clip": Clip()})


def test_psnr_is_perceptuals(tmp_path: Path, models: ProtocolModels) -> None:
    a, b = run(tmp_path / "a", 1, equal=2), run(tmp_path / "b", 2, equal=2)
    squared, size = movements({"a": a.pictures, "b": b.pictures}, [("a", "b")])
    metric = Metric(name="psnr", groups=("erased", "kept"), against=("reference",))
    figures, values = apart(metric, "reference", a, b, models, squared, size)
    expected = psnr(a.pictures, b.pictures)
    assert tuple(figures) == metric.measures()
    assert figures["psnr.erased"] == bootstrap.mean(expected[2:ERASED], unit="dB, 2 of 4 pairs equal", better="higher")
    assert figures["psnr.kept"] == bootstrap.mean(expected[ERASED:], unit="dB, 0 of 6 pairs equal", better="higher")
    assert np.isnan(values["psnr"][:2]).all()
    assert np.array_equal(values["psnr"][2:], expected[2:])
    alike, size = movements({"a": a.pictures, "c": a.pictures}, [("a", "c")])
    c = RunImages("c", a.cases, a.pictures, a.folder, progress=False)
    same, _ = apart(Metric(name="psnr", against=("base",)), "base", a, c, models, alike, size)
    assert (same["psnr"].value, same["psnr"].error) == (None, "10 of 10 pairs equal: too few differ for a mean")


def test_psnr_of_images_of_several_sizes_is_by_each_ones_pixels(tmp_path: Path, models: ProtocolModels) -> None:
    a, b = run(tmp_path / "a", 1, grow=8), run(tmp_path / "b", 2, grow=8)
    squared, size = movements({"a": a.pictures, "b": b.pictures}, [("a", "b")])
    _, values = apart(Metric(name="psnr", against=("reference",)), "reference", a, b, models, squared, size)
    assert len({picture.shape for picture in a.pictures}) == COUNT
    assert np.array_equal(values["psnr"], psnr(a.pictures, b.pictures))


def test_fid_and_kid_are_of_the_groups_features(tmp_path: Path, models: ProtocolModels) -> None:
    a, b = run(tmp_path / "a", 1), run(tmp_path / "b", 2)
    ours, theirs = (Clip().image_features(list(one.pictures)) for one in (a, b))
    for name in ("fid", "kid"):
        metric = Metric(name=name, model="demo:clip", groups=("kept",), against=("base", "reference"))  # type: ignore[arg-type]
        figures, values = apart(metric, "base", a, b, models, {}, 0)
        expected = distance(name, "demo:clip", ours[ERASED:], theirs[ERASED:])  # type: ignore[arg-type]
        assert figures == {f"{name}.kept": expected}
        assert values == {}
        p = features_p_value(metric, a, b, models)
        assert p.value == mmd_p_value(ours, theirs).value
        assert p.method.endswith("features of demo:clip")
    everything, _ = apart(Metric(name="fid", model="demo:clip", against=("base",)), "base", a, b, models, {}, 0)
    assert list(everything) == ["fid"]


def test_lpips_of_every_size_and_group(tmp_path: Path) -> None:
    import torch
    from torchvision.models import alexnet

    torch.manual_seed(0)
    torch.save(alexnet(weights=None).state_dict(), tmp_path / TRUNK)
    a, b = run(tmp_path / "a", 1, size=40), run(tmp_path / "b", 2, size=40)
    models = ProtocolModels({"alexnet": tmp_path})
    metric = Metric(
        name="lpips", groups=("erased", "kept"), variants=("64", "native"), against=("base",), difference=True
    )
    figures, values = apart(metric, "base", a, b, models, {}, 0)
    assert set(figures) == set(metric.measures())
    for variant, size in (("64", 64), ("native", None)):
        network = Lpips(tmp_path, size=size)
        expected = network.distances(a.pictures, b.pictures)
        for group, rows, better in (("erased", slice(0, ERASED), "higher"), ("kept", slice(ERASED, COUNT), "lower")):
            found = figures[f"lpips.{group}.{variant}"]
            assert found == bootstrap.mean(expected[rows], unit=network.name, better=better)  # type: ignore[arg-type]
            one = values[f"lpips.{group}.{variant}"]
            assert np.array_equal(one[rows], expected[rows])
            assert np.isfinite(one).sum() == len(expected[rows])
        gap = figures[f"lpips.difference.{variant}"]
        assert gap.value == expected[:ERASED].mean() - expected[ERASED:].mean()
        assert gap.n == COUNT
    # Beside the edited model's images, every distance is a loss.
    judged, _ = apart(metric.model_copy(update={"against": ("reference",)}), "reference", a, b, models, {}, 0)
    assert judged["lpips.erased.64"].better == "lower"
    assert judged["lpips.erased.64"].value == figures["lpips.erased.64"].value


def test_the_difference_of_two_groups_resamples_each(tmp_path: Path) -> None:
    random = np.random.default_rng(1)
    erased, kept = random.normal(0.4, 0.1, 400), random.normal(0.1, 0.05, 900)
    found = difference(erased, kept, "LPIPS")
    spread = 1.96 * np.sqrt(erased.var() / 400 + kept.var() / 900)
    assert found.value == erased.mean() - kept.mean()
    assert found.low is not None
    assert found.high is not None
    # Of 2000 resamples a quantile is known to about 5 % of the width; measured: 3 %.
    assert found.value - found.low == pytest.approx(spread, rel=0.1)
    assert found.high - found.value == pytest.approx(spread, rel=0.1)
    few = difference(erased[:1], kept, "LPIPS")
    assert (few.value, few.error) == (None, "1 erased and 900 kept images: two of each are needed")


@pytest.mark.parametrize("name", ["psnr", "fid"])
def test_without_the_other_runtime_every_figure_says_why(tmp_path: Path, models: ProtocolModels, name: str) -> None:
    a = run(tmp_path / "a", 1)
    metric = Metric(name=name, groups=("erased", "kept"), against=("base",))  # type: ignore[arg-type]
    for first, why in ((None, "no runtime is the base"), (a, "this is the base itself")):
        figures, values = apart(metric, "base", first, a, models, {}, 0)
        assert tuple(figures) == metric.measures()
        assert {one.error for one in figures.values()} == {why}
        assert {one.value for one in figures.values()} == {None}
        assert values == {}
