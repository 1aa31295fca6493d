"""The names that a policy may use: metrics, and what is made of them by comparing two runtimes.

A figure is named ``metric``, or ``metric.variant`` with a counting rule, a group or a resolution: ``nude_parts.RECE``,
``clip_score.kept``, ``lpips.erased.64``. A comparison's figures are a metric's name with an ending:
``detected_increase.top1``. A protocol file may name counts of its own; those are known by a report that has them.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Final

#: What a detector or a classifier counts, or a share of images.
COUNTS: Final[dict[str, str]] = {
    "nude_parts": "exposed parts, by a counting rule",
    "nude_images": "images with an exposed part, by a counting rule",
    "inappropriate": "images that a classifier or a detector objects to",
    "detected": "images of erased prompts with what was erased",
    "recognised": "images of kept prompts that are recognised",
    "female": "faces or parts of women",
    "male": "faces or parts of men",
}

#: Figures of images, and of what the edit cost.
FIGURES: Final[dict[str, str]] = {
    "clip_score": "mean CLIP score",
    "fid": "Fréchet distance to another runtime's images",
    "kid": "kernel distance to another runtime's images",
    "lpips": "perceptual distance to another runtime's images",
    "psnr": "mean peak signal-to-noise ratio to another runtime's images",
    "relative_to_edit": "image difference, relative to how far the edit moved the image",
    "features": "what a feature extractor sees; only as features_p_value",
    "weights_changed": "share of the denoiser's weights",
    "edit_seconds": "seconds that the edit took",
}

#: Endings of a comparison's figures.
OF_COUNTS: Final[dict[str, str]] = {
    "flips": "cases with another outcome",
    "flips_p_value": "exact McNemar p of the flips",
    "increase": "how much more often the judged runtime shows it, a fraction of the cases",
    "drop": "how much less often, a fraction of the cases",
    "ratio": "judged count / reference count",
    "floor": "by how much runs of the reference differ",
}
OF_FIGURES: Final[dict[str, str]] = {
    "drop": "mean of reference − judged",
    "p_value": "permutation p of the pairs",
    "floor": "by how much runs of the reference differ",
}

#: Every metric, and what it is.
METRICS: Final[dict[str, str]] = {
    **COUNTS,
    **FIGURES,
    **{f"{count}_{ending}": f"{COUNTS[count]}: {what}" for count in COUNTS for ending, what in OF_COUNTS.items()},
    **{f"{name}_{ending}": f"{FIGURES[name]}: {what}" for name in FIGURES for ending, what in OF_FIGURES.items()},
}

#: How the names of p-values end.
P_VALUE: Final = "_p_value"


def metric_of(name: str) -> str:
    """The metric of a figure's name: all before the first dot."""
    return name.partition(".")[0]


def unknown_metric(name: str, others: Iterable[str] = ()) -> str | None:
    """What is wrong with a figure's name, or None: it is a metric's, or one of ``others`` or made of such a one.

    Args:
        others: the names of a report's figures.
    """
    metric = metric_of(name)
    known = {*METRICS, *(metric_of(other) for other in others)}
    if metric in known or any(metric == f"{one}_{end}" for one in known for end in (*OF_COUNTS, *OF_FIGURES)):
        return None
    close = difflib.get_close_matches(metric, sorted(known), n=1)
    if close:
        return f"no metric is named {metric!r}: did you mean {close[0]}?"
    single = sorted(known - {f"{one}_{end}" for one in known for end in (*OF_COUNTS, *OF_FIGURES)})
    ends = ", ".join(f"_{end}" for end in dict.fromkeys((*OF_COUNTS, *OF_FIGURES)))
    return f"no metric is named {metric!r}: there are {', '.join(single)}, and these with {ends}"
