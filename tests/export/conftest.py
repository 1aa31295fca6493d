"""A stand-in edit, and exports of the tiny model made once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from excise.errors import FingerprintMismatch


@dataclass(frozen=True)
class RandomEdit:
    """Multiplies every site from the right by one random matrix near the identity (d × d)."""

    sites: tuple[str, ...]
    size: float = 0.2
    component: str = "unet"
    foreign: bool = False
    id: str = "5e" * 32
    summary: str = "random: 'gun' → ' '"

    @property
    def metadata(self) -> SimpleNamespace:
        return SimpleNamespace(component=self.component, concepts=())

    @property
    def matrix(self) -> NDArray[np.float64]:
        return np.eye(32) + self.size * np.random.default_rng(0).standard_normal((32, 32))

    def apply(self, weights: Mapping[str, NDArray[Any]], *, force: bool = False) -> dict[str, NDArray[Any]]:
        assert set(weights) == set(self.sites)
        if self.foreign and not force:
            raise FingerprintMismatch("the edit was made for another model")
        return {
            name: (weight.astype(np.float64) @ self.matrix).astype(weight.dtype) for name, weight in weights.items()
        }


@pytest.fixture(scope="session", autouse=True)
def _optimum() -> None:
    """Import Optimum as the export does: with warnings as errors it would take diffusers for missing."""
    from excise.export.quiet import quiet

    with quiet():
        import optimum.exporters.onnx  # noqa: F401


@pytest.fixture(scope="session")
def sites(tiny_model: Path) -> tuple[str, ...]:
    """The tiny UNet's eight key and value weights."""
    from safetensors import safe_open

    with safe_open(tiny_model / "unet" / "diffusion_pytorch_model.safetensors", framework="numpy") as opened:
        names = list(opened.keys())
    return tuple(sorted(name for name in names if ".attn2.to_k." in name or ".attn2.to_v." in name))


@pytest.fixture(scope="session")
def edit(sites: tuple[str, ...]) -> RandomEdit:
    return RandomEdit(sites)


@pytest.fixture(scope="session")
def optimum(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What plain Optimum writes for the unedited model. Not to be changed by tests."""
    folder = tmp_path_factory.mktemp("optimum") / "onnx"
    from excise.export.pipeline import load_pipeline
    from excise.export.quiet import quiet

    with quiet():
        from optimum.exporters.onnx import onnx_export_from_model

        onnx_export_from_model(load_pipeline(tiny_model), folder, task="text-to-image")
    return folder


@pytest.fixture(scope="session")
def plain(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model exported without an edit. Not to be changed by tests."""
    from excise.export.onnx_export import export_pipeline

    out = tmp_path_factory.mktemp("plain") / "onnx"
    export_pipeline(tiny_model, out)
    return out


@pytest.fixture(scope="session")
def edited(tiny_model: Path, edit: RandomEdit, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model exported with the edit. Not to be changed by tests."""
    from excise.export.onnx_export import export_pipeline

    out = tmp_path_factory.mktemp("edited") / "onnx"
    export_pipeline(tiny_model, out, edit=edit)
    return out
