"""Which share of the denoiser's weights an edit changes, as the RECE paper's Table 5 has it."""

from __future__ import annotations

import math
from pathlib import Path

from safetensors import safe_open

from excise.editfile import load_edit
from excise.eval.evaluation import Measure
from excise.eval.runtime_spec import RuntimeSpec

_COMPONENTS = ("unet", "transformer")


def weights_changed(spec: RuntimeSpec) -> Measure:
    """Numbers in the weights that the edit names, of all in the denoiser.

    Known of ``torch:DIR?edit=FILE``: what a folder or a server was made from, its weights don't say.
    """
    if spec.kind != "torch" or not spec.options.get("edit"):
        why = "known of torch:DIR?edit=FILE only"
        return Measure(value=None, n=0, unit="fraction", better="lower", error=why)
    sites = set(load_edit(Path(spec.options["edit"])).sites)
    sizes: dict[str, int] = {}
    for component in _COMPONENTS:
        for file in sorted((Path(spec.place) / component).glob("*.safetensors")):
            with safe_open(file, framework="np") as opened:
                sizes |= {name: math.prod(opened.get_slice(name).get_shape()) for name in opened.keys()}  # noqa: SIM118
    if missing := sorted(sites - set(sizes)):
        why = f"the folder has no weight {missing[0]} in safetensors"
        return Measure(value=None, n=0, unit="fraction", better="lower", error=why)
    share = sum(sizes[site] for site in sites) / sum(sizes.values())
    return Measure(value=share, n=len(sites), unit="fraction", method="exact", better="lower")
