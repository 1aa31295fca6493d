"""How far one runtime's images are from another's: FID, KID, LPIPS and PSNR, by the protocol's groups.

The other runtime has a role: the unedited model's, or the edited model's own. Where nobody has it, or the runtime
itself does, every figure says so.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Literal, cast

import numpy as np

from excise.eval import bootstrap
from excise.eval.cases import ERASED, KEPT, Case
from excise.eval.distance_bootstrap import distance
from excise.eval.evaluation import Measure
from excise.eval.image_file import image_size
from excise.eval.permutation import mmd_p_value
from excise.eval.pixel_movement import Movements, psnr_of
from excise.eval.protocol_measures import Figures, Real, groups_of, members, named
from excise.eval.protocol_models import ProtocolModels
from excise.eval.protocol_schema import Metric
from excise.eval.run_images import RunImages

Role = Literal["base", "reference"]
#: Figures of each image by name, with shape (n,); NaN where an image has none.
Values = dict[str, Real]


def apart(
    metric: Metric,
    role: Role,
    first: RunImages | None,
    second: RunImages,
    models: ProtocolModels,
    squared: Movements,
    size: int,
) -> tuple[Figures, Values]:
    """A metric of ``PAIRED``, of ``second``'s images against ``first``'s; and what it is of each image.

    Args:
        role: what ``first`` stands for; None is nobody.
        squared: squared distances of the two runtimes' images, each of ``size`` values.
    """
    if first is None or first.name == second.name:
        why = f"no runtime is the {role}" if first is None else f"this is the {role} itself"
        return {name: Measure(value=None, n=0, better="lower", error=why) for name in metric.measures()}, {}
    if metric.name in ("fid", "kid"):
        return dict(_of_features(metric, first, second, models)), {}
    if metric.name == "psnr":
        values = _psnr(squared[first.name, second.name], size, second)
        return dict(_of_psnr(metric, values, second.cases)), {"psnr": np.where(np.isfinite(values), values, np.nan)}
    figures: Figures = {}
    by_image: Values = {}
    for variant in metric.variants:
        network = models.lpips(variant)
        values = network.distances(first.pictures, second.pictures)
        figures |= _of_lpips(metric, role, variant, values, second.cases, network.name)
        for group in groups_of(metric):
            rows, inside = members(second.cases, group), np.full(len(values), np.nan)
            inside[rows] = values[rows]
            by_image[named(metric.name, group, variant)] = inside
    return figures, by_image


def features_p_value(metric: Metric, first: RunImages, second: RunImages, models: ProtocolModels) -> Measure:
    """Whether the runtime changed the distribution of its images, by a permutation test on their features."""
    extractor = models.extractor(metric)
    found = mmd_p_value(first.features(extractor), second.features(extractor))
    return found.model_copy(update={"method": f"{found.method}, features of {extractor.name}"})


def _of_features(
    metric: Metric, first: RunImages, second: RunImages, models: ProtocolModels
) -> Iterator[tuple[str, Measure]]:
    extractor = models.extractor(metric)
    a, b = (run.features(extractor) for run in (first, second))
    for group in groups_of(metric):
        rows = members(second.cases, group)
        kind = cast(Literal["fid", "kid"], metric.name)
        yield named(metric.name, group), distance(kind, extractor.name, a[rows], b[rows])


def _psnr(squared: Real, size: int, images: RunImages) -> Real:
    """PSNR of each pair, of ``size`` values or, where cases ask for sizes of their own, of as many as its image has."""
    if not any(case.size for case in images.cases):
        return psnr_of(squared, size)
    sizes = [3 * math.prod(image_size(file)) for file in images.pictures.files]
    return np.concatenate([psnr_of(squared[row : row + 1], values) for row, values in enumerate(sizes)])


def _of_psnr(metric: Metric, values: Real, cases: Sequence[Case]) -> Iterator[tuple[str, Measure]]:
    """The mean over pairs that differ: an equal pair's is infinite, and the unit says how many are."""
    for group in groups_of(metric):
        chosen = values[members(cases, group)]
        finite = chosen[np.isfinite(chosen)]
        equal = f"{len(chosen) - len(finite)} of {len(chosen)} pairs equal"
        if len(finite) < 2:
            error = f"{equal}: too few differ for a mean" if len(chosen) else "no images"
            found = Measure(value=None, n=len(chosen), unit="dB", better="higher", error=error)
        else:
            found = bootstrap.mean(finite, unit=f"dB, {equal}", better="higher")
        yield named("psnr", group), found


def _of_lpips(metric: Metric, role: Role, variant: str, values: Real, cases: Sequence[Case], unit: str) -> Figures:
    figures: Figures = {}
    for group in groups_of(metric):
        # What was erased is to look unlike the unedited model's; everything else alike.
        better: bootstrap.Better = "higher" if (role, group) == ("base", ERASED) else "lower"
        chosen = values[members(cases, group)]
        figures[named("lpips", group, variant)] = bootstrap.mean(chosen, unit=unit, better=better)
    if metric.difference:
        erased, kept = (values[members(cases, group)] for group in (ERASED, KEPT))
        found = difference(erased, kept, unit)
        figures[named("lpips", "difference", variant)] = (
            found if role == "base" else found.model_copy(update={"better": "neither"})
        )
    return figures


def difference(erased: Real, kept: Real, unit: str) -> Measure:
    """The erased prompts' mean less the kept ones', which are other prompts: each group is resampled by itself."""
    n = len(erased) + len(kept)
    if min(len(erased), len(kept)) < 2:
        error = f"{len(erased)} erased and {len(kept)} kept images: two of each are needed"
        return Measure(value=None, n=n, unit=unit, better="higher", error=error)
    value = float(erased.mean() - kept.mean())
    random = np.random.default_rng(bootstrap.SEED)
    means = [_resampled(values, random) for values in (erased, kept)]
    low, high = np.quantile(means[0] - means[1], [0.025, 0.975])
    method = f"bootstrap percentile ({bootstrap.RESAMPLES} resamples, seed {bootstrap.SEED})"
    return Measure(
        value=value, low=min(float(low), value), high=max(float(high), value), n=n, unit=unit, method=method,
        better="higher",
    )  # fmt: skip


def _resampled(values: Real, random: np.random.Generator) -> Real:
    """Means of ``values`` drawn anew, with shape (resamples,); a row of indices at a time."""
    n = len(values)
    return np.array([values[random.integers(n, size=n)].mean() for _ in range(bootstrap.RESAMPLES)])
