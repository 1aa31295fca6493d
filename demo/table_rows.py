"""The rows of ``excise eval demo-table``: what erases the bundled model's weapons, by which settings, and from where.

Published hyperparameters where two cores can afford them; where not, the smaller budget is the row's ``smaller``, which
the table says beside it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Final

from excise.demo.vocabulary import KEPT, WEAPONS, article

#: What a guidance away from weapons is told, within the text encoder's 24 tokens.
UNSAFE: Final = ", ".join(f"{article(name)} {name}" for name in WEAPONS)


@dataclass(frozen=True)
class Row:
    """One eraser.

    Attributes:
        title: as in the table.
        overrides: what the recipe has in place of the preset ``weapons``; None for a row without an edit file.
        options: of the runtime, such as ``sld``.
        smaller: what is smaller than published, in words; empty where nothing is.
    """

    title: str
    overrides: Mapping[str, Any] | None = None
    options: Mapping[str, str] = field(default_factory=dict)
    smaller: str = ""


def _trained(title: str, method: str, **parameters: float) -> Row:
    """A method that trains, with 20 steps of DDIM for what it draws."""
    parameters = {**parameters, "num_inference_steps": 20}
    shown = ", ".join(f"{name} {value:g}" for name, value in parameters.items())
    return Row(
        title,
        {"method": method, "parameters": parameters},
        smaller=f"{shown}, chosen for a model of 10 M parameters and for two cores",
    )


#: By name, which is also the name of a runtime and of an edit file. The first is the unedited model.
ROWS: Final[Mapping[str, Row]] = MappingProxyType(
    {
        "base": Row("none"),
        "esd-x": _trained("ESD-x", "esd-x", iterations=240, learning_rate=5e-4),
        "esd-u": _trained("ESD-u", "esd-u", iterations=240, learning_rate=2e-4),
        "ca": _trained("CA", "ca", iterations=200, learning_rate=2e-4, images=60),
        "sa": _trained(
            "SA", "sa", iterations=120, batch_size=8, surrogate_images=48, replay_images=64, fisher_timesteps=10
        ),
        "sld-medium": Row("SLD-Medium", options={"sld": "medium", "sld_concept": UNSAFE}),
        "sld-max": Row("SLD-Max", options={"sld": "max", "sld_concept": UNSAFE}),
        "uce": Row("UCE", {"method": "uce"}),
        "rece-published": Row("RECE, anchor current (published)", {"method": "rece", "anchor": "current"}),
        "rece": Row("RECE, anchor original", {"method": "rece", "anchor": "original"}),
        "speed": Row("SPEED", {"method": "speed"}),
        "dp": Row(
            "Double Projections",
            {"method": "dp", "keep": ["", *KEPT[:8]]},
            smaller="8 of 34 kept objects, since all of them leave no direction of 256 free",
        ),
        "trce1": Row("TRCE, stage 1", {"method": "trce1"}),
        "leace": Row("LEACE", {"method": "leace"}),
    }
)

#: The same for one artist's style, by the methods that the paper's Table 4 has.
ARTIST_ROWS: Final[Mapping[str, Row]] = MappingProxyType(
    {name: ROWS[name] for name in ("base", "esd-x", "ca", "uce", "rece-published", "rece")}
)

#: The attacks, with their budgets for two cores in place of the published ones.
BUDGETS: Final[Mapping[str, Mapping[str, Any]]] = MappingProxyType(
    {
        "closed-form": {},
        "ring-a-bell": {"tokens": 8, "generations": 100},
        "unlearn-diff-atk": {"tokens": 3, "timesteps": 10, "iterations": 10},
        "p4d-n": {"tokens": 8, "iterations": 100, "evaluate_every": 25},
    }
)
