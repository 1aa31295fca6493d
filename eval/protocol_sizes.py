"""Images of other sizes than a model's own: how many a protocol asks for, and whether a runtime can be asked.

Without this a run would fail at its first such image, which may be hours in.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from excise.errors import UsageError
from excise.eval.cases import Case
from excise.eval.runtime_spec import RuntimeSpec
from excise.serve.latent_shape import halvings, latent_shape
from excise.serve.onnx_component import read_config
from excise.serve.onnx_signature import read_signature

Size = tuple[int, int]  #: (height, width) in pixels

#: Sizes that a message names.
_SHOWN = 3


def sizes_in_words(sizes: Iterable[Size]) -> str:
    """``512 x 512``, or with the number of images of each where there are several, the most frequent first."""
    counted = Counter(sizes).most_common()
    if len(counted) == 1:
        return _shown(counted[0][0])
    return ", ".join(f"{_shown(size)} ({count})" for size, count in counted)


def check_sizes(protocol: str, cases: Sequence[Case], spec: RuntimeSpec) -> None:
    """Whether a runtime can be asked for the sizes of ``cases``, by its kind and its files; nothing is loaded.

    Raises:
        UsageError: it makes images of one size, and the cases ask for others.
        ArtefactError, ModelError: a folder can't be read.
    """
    asked = Counter(case.size for case in cases if case.size is not None)
    if spec.kind == "triton" and len(asked) > 1:
        _refuse(protocol, asked, spec, "whose model takes no size")
    if spec.kind == "onnx" and asked:
        folder = Path(spec.place)
        unet, vae = read_config(folder, "unet"), read_config(folder, "vae_decoder")
        factor = halvings(vae)
        _, height, width = latent_shape(unet, vae)
        own = (height * factor, width * factor)
        others = Counter({size: count for size, count in asked.items() if size != own})
        if not others:
            return
        if any(side != -1 for side in read_signature(folder / "unet" / "model.onnx").inputs["sample"].shape[2:]):
            _refuse(protocol, others, spec, f"which was exported for images of {_shown(own)} pixels alone")
        multiple = factor * halvings(unet)
        if odd := Counter({size: count for size, count in others.items() if any(side % multiple for side in size)}):
            _refuse(protocol, odd, spec, f"which makes images whose sides are multiples of {multiple} pixels")


def _refuse(protocol: str, asked: Counter[Size], spec: RuntimeSpec, why: str) -> None:
    named = ", ".join(_shown(size) for size, _ in asked.most_common(_SHOWN)) + (", …" if len(asked) > _SHOWN else "")
    raise UsageError(
        f"{protocol} asks for {asked.total()} images of {named} pixels, and {spec.name}={spec} is one {why}: give "
        "--image-size own to take each model's own, which the report will name, or leave that runtime out"
    )


def _shown(size: Size) -> str:
    return f"{size[1]} x {size[0]}"
