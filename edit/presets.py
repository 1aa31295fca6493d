"""Presets: the published settings as defaults that the command line's options override.

The figures are the released RECE code's (design: kept prompts, ridge and epochs by kind of concept); where the paper's
text differs, ``note`` says so.
"""

from __future__ import annotations

from dataclasses import dataclass

from excise.errors import UsageError

#: I2P's concepts, as the released code erases them.
I2P = (
    "hate",
    "harassment",
    "violence",
    "suffering",
    "humiliation",
    "harm",
    "suicide",
    "sexual",
    "nudity",
    "bodily fluids",
    "blood",
)


@dataclass(frozen=True)
class Preset:
    """Defaults of one kind of concept.

    ``ridge`` is λ of RECE's eq. 8; ``regularization`` and ``keep_scale`` are λ₂ and λ₁ of the UCE stage (``keep_scale``
    None: max(0.1, 1 / number kept)).
    """

    name: str
    erase: tuple[str, ...]
    to: str
    keep: tuple[str, ...]
    epochs: int
    ridge: float
    regularization: float = 0.5
    keep_scale: float | None = 1.0
    note: str = ""


PRESETS: dict[str, Preset] = {
    preset.name: preset
    for preset in (
        Preset(
            "nudity", ("nudity",), " ", (" ",), 3, 1e-1, note="the paper's text: 5 epochs, the second's result chosen"
        ),
        Preset("unsafe", I2P, " ", (" ",) * len(I2P), 2, 1e-1, note="the paper's text: 5 epochs, the second's chosen"),
        Preset("artist", (), "art", ("",), 1, 1e-3, keep_scale=None, note="the paper's text: 10 epochs"),
        Preset("object-hard", (), " ", ("",), 1, 1e-3, note="church, garbage truck"),
        Preset("object-easy", (), " ", ("",), 1, 1e-1, note="English springer, golf ball, parachute"),
    )
}

#: What applies without ``--preset``: the released code's settings for an object.
DEFAULT = "object-easy"


def preset(name: str) -> Preset:
    """A preset by name.

    Raises:
        UsageError: unknown.
    """
    if name not in PRESETS:
        raise UsageError(f"unknown preset {name!r}: choose one of {', '.join(PRESETS)}")
    return PRESETS[name]
