"""Erase concepts from text-to-image diffusion models in closed form, ship them, and prove it on the artefact."""

from __future__ import annotations

from importlib.metadata import version

__version__ = version("excise")
