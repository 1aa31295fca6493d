"""Edits by name in a folder: made once, taken as they are, refused where they are another recipe's."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from excise.edit.erase import erase
from excise.edit.made_edits import made_edits
from excise.edit.recipe import Recipe, resolve
from excise.editfile import Edit
from excise.errors import ArtefactError


def recipe(epochs: int, erased: str = "gun") -> Recipe:
    return resolve(None, None, {"erase": [erased], "to": ["sunflower"], "keep": ["cat"], "epochs": epochs})


def test_what_is_missing_is_made_and_what_is_there_is_kept(tiny_model: Path, tmp_path: Path) -> None:
    asked: list[int] = []

    def solve(one: Recipe, checkpoints: Path) -> Edit:
        assert checkpoints.parent == tmp_path / "edits"
        asked.append(int(one.epochs))
        return erase(tiny_model, one, certificate=False)

    first = made_edits(tmp_path / "edits", {"none": recipe(0)}, solve)
    digest = first.files["none"].read_bytes()
    both = made_edits(tmp_path / "edits", {"none": recipe(0), "one": recipe(1)}, solve)
    assert asked == [0, 1]
    assert both.files["none"].read_bytes() == digest
    assert both.seconds["none"] == first.seconds["none"] > 0
    assert json.loads((tmp_path / "edits" / "one.json").read_text())["seconds"] == both.seconds["one"]


@pytest.mark.parametrize("other", [recipe(1), recipe(0, "cat's gun")], ids=["epochs", "concept"])
def test_an_edit_of_another_recipe_is_refused(tiny_model: Path, tmp_path: Path, other: Recipe) -> None:
    made_edits(tmp_path, {"a": recipe(0)}, lambda one, _: erase(tiny_model, one, certificate=False))

    def never(one: Recipe, checkpoints: Path) -> Edit:
        raise AssertionError

    with pytest.raises(ArtefactError, match=r"a\.safetensors was made by another recipe"):
        made_edits(tmp_path, {"a": other}, never)
