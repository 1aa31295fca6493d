"""The share of the denoiser's weights that an edit changes, against the loaded model's own count."""

from __future__ import annotations

from pathlib import Path

import pytest

from excise.edit.erase import erase
from excise.edit.recipe import resolve
from excise.editfile import save_edit
from excise.eval.runtime_spec import parse_runtime
from excise.eval.weights_changed import weights_changed


@pytest.fixture(scope="module")
def edit(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("edit") / "gun.safetensors"
    save_edit(path, erase(tiny_model, resolve(None, None, {"erase": ["gun"], "to": ["sunflower"], "keep": ["cat"]})))
    return path


def test_the_share_is_that_of_the_cross_attentions_keys_and_values(tiny_model: Path, edit: Path) -> None:
    from diffusers import UNet2DConditionModel

    weights = dict(UNet2DConditionModel.from_pretrained(tiny_model / "unet").named_parameters())
    moved = [one.numel() for name, one in weights.items() if "attn2.to_k" in name or "attn2.to_v" in name]
    found = weights_changed(parse_runtime(f"edited=torch:{tiny_model}?edit={edit}"))
    assert found.value == sum(moved) / sum(one.numel() for one in weights.values())
    assert (found.n, found.unit, found.error) == (len(moved), "fraction", None)


def test_where_it_is_not_known_the_figure_says_why(tiny_model: Path, edit: Path) -> None:
    for source in (f"base=torch:{tiny_model}", "server=openai:http://localhost:1"):
        found = weights_changed(parse_runtime(source))
        assert (found.value, found.error) == (None, "known of torch:DIR?edit=FILE only")
    # A folder without a denoiser.
    wrong = weights_changed(parse_runtime(f"x=torch:{tiny_model.parent}?edit={edit}"))
    assert wrong.value is None
    assert wrong.error is not None
    assert wrong.error.startswith("the folder has no weight ")
