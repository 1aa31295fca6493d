"""Drawings by matplotlib as ``<svg>`` elements of a page: in the page's own colours, and named for screen readers.

matplotlib draws in placeholder colours, which are then replaced with CSS variables; so one drawing is right in the
dark, in the light and on paper.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final
from xml.etree import ElementTree

from excise.errors import MissingExtra

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

#: Placeholder → CSS variable.
INK: Final = "#010203"
RULE: Final = "#010204"
SERIES: Final = ("#010210", "#010211", "#010212", "#010213", "#010214", "#010215", "#010216")
_VARIABLES: Final = {INK: "--ink", RULE: "--rule", **{color: f"--series-{n}" for n, color in enumerate(SERIES)}}
_SVG, _XLINK = "http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"
#: Inches; a point of text is a CSS pixel and a third.
_WIDTH: Final = 5.4
_STYLE: Final[Any] = {
    "svg.fonttype": "none",
    "text.parse_math": False,
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    **dict.fromkeys(("text.color", "axes.labelcolor", "xtick.color", "ytick.color"), INK),
    **dict.fromkeys(("axes.edgecolor", "grid.color"), RULE),
    "grid.linewidth": 0.8,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
}


@dataclass(frozen=True)
class Plot:
    """One drawing: ``svg`` is an ``<svg>`` element, named by ``title`` and ``description``."""

    title: str
    description: str
    svg: str


def drawn(
    panels: int, height: float, draw: Callable[[Sequence[Axes]], None], title: str, description: str, key: str
) -> str:
    """Panels below each other with one x axis, as an ``<svg>`` element.

    Args:
        panels: how many axes ``draw`` gets, from the top.
        height: inches, of all of them.
        key: begins the ids in the element; unique on the page.

    Raises:
        MissingExtra: matplotlib isn't installed.
    """
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtra("matplotlib", "eval") from error
    # The salt makes the ids, and so the bytes, the same every time.
    with matplotlib.rc_context({**_STYLE, "svg.hashsalt": key}):
        figure = Figure(figsize=(_WIDTH, height), layout="constrained")
        draw(list(figure.subplots(panels, 1, sharex=True, squeeze=False)[:, 0]))
        return _inline(_svg(figure), title, description, key)


def _svg(figure: Figure) -> str:
    buffer = io.StringIO()
    # Of the metadata, matplotlib writes a date unless it is told not to.
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    return buffer.getvalue()


def _inline(source: str, title: str, description: str, key: str) -> str:
    """matplotlib's file as an element: named, with ids of its own, no size of its own, CSS colours and fonts."""
    for placeholder, variable in _VARIABLES.items():
        source = source.replace(placeholder, f"var({variable})")
    # matplotlib writes the short form or the long one, by its version.
    source = re.sub(r"(font: [\d.]+px|font-family:) [^;\"]+", r"\1 system-ui, sans-serif", source)
    ElementTree.register_namespace("", _SVG)
    ElementTree.register_namespace("xlink", _XLINK)
    root = ElementTree.fromstring(source)
    # Its style sheet would hold for the whole page, which has the same rule for drawings alone.
    for parent in list(root.iter()):
        for child in [child for child in parent if child.tag in (f"{{{_SVG}}}metadata", f"{{{_SVG}}}style")]:
            parent.remove(child)
    for element in root.iter():
        for name, value in element.attrib.items():
            if name == "id":
                element.set(name, f"{key}-{value}")
            elif name == f"{{{_XLINK}}}href":
                element.set(name, f"#{key}-{value.removeprefix('#')}")
            else:
                element.set(name, value.replace("url(#", f"url(#{key}-"))
    width = float((root.get("width") or "0").removesuffix("pt"))
    for name in ("width", "height", "version"):
        root.attrib.pop(name, None)
    root.set("role", "img")
    root.set("aria-labelledby", f"{key}-title {key}-desc")
    root.set("style", f"max-width: {width:g}pt")
    for tag, text in (("desc", description), ("title", title)):
        element = ElementTree.Element(f"{{{_SVG}}}{tag}", {"id": f"{key}-{tag}"})
        element.text = text
        root.insert(0, element)
    # A page knows the names of SVG, so that it names no address at all.
    return re.sub(r' xmlns(:\w+)?="[^"]*"', "", ElementTree.tostring(root, encoding="unicode"))
