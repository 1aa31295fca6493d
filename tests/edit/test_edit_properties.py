"""Whatever a recipe says: a finite edit that is saved, read and applied, or an error on one line that says what to do."""

from __future__ import annotations

import math
import shutil
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from excise.edit.apply import edited_weights, stored_arrays
from excise.edit.cache import EmbeddingCache
from excise.edit.erase import erase
from excise.edit.recipe import resolve
from excise.editfile import load_edit, save_edit
from excise.errors import ExciseError, NumericsError, UsageError

UNET, TEXT = Path("unet/diffusion_pytorch_model.safetensors"), Path("text_encoder/model.safetensors")
METHODS = ["rece", "uce", "speed", "dp", "trce1", "leace"]

#: What users write, and what they don't.
ODD = ["", " ", "gun", "gun ", "GUN", "a gun", "🔫", "武器", "\u202egun", "gun\n", "\0", "<|endoftext|>", "g" * 200, "é" * 7]
texts = st.one_of(st.sampled_from(["gun", "cat", "sword", "dog", "a red cat"]), st.sampled_from(ODD), st.text(max_size=9))
#: Most are numbers that can be meant.
scales = st.one_of(
    st.floats(-6, 6).map(lambda exponent: 10.0**exponent),
    st.sampled_from([1e-6, 1.0, 1e6]),
    st.sampled_from([math.nan, math.inf, -math.inf, -1.0, 0.0, 5e-324, 1e308]),
)
usual = st.floats(-6, 6).map(lambda exponent: 10.0**exponent)


def recipes(words: st.SearchStrategy[str], numbers: st.SearchStrategy[float]) -> st.SearchStrategy[dict[str, Any]]:
    return st.fixed_dictionaries(
        {
            "erase": st.lists(words, min_size=1, max_size=3),
            "method": st.sampled_from(METHODS),
            "keep": st.lists(words, max_size=3),
        },
        optional={
            "to": st.lists(words, min_size=1, max_size=2),
            "expand": st.sampled_from(["none", "artist", "object"]),
            "erase_scale": numbers,
            "keep_scale": st.one_of(numbers, st.just("auto")),
            "regularization": numbers,
            "ridge": numbers,
            "epochs": st.one_of(st.integers(0, 2), st.just("auto")),
            "epoch_scales": st.fixed_dictionaries({}, optional={"erase": numbers, "keep": numbers}),
            "technique": st.sampled_from(["replace", "tensor"]),
            "anchor": st.sampled_from(["current", "original"]),
            "rule": st.sampled_from(["last-subject", "all"]),
            "sites": st.fixed_dictionaries(
                {}, optional={"projections": st.sampled_from(["both", "k", "v"]), "conditional_only": st.booleans()}
            ),
        },
    )


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("workshop")


def attempt(model: Path, workshop: Path, values: dict[str, Any]) -> bool:
    """Whether an edit came of it; if not, the error was one that a user can put right."""
    file = workshop / "edit.safetensors"
    file.unlink(missing_ok=True)
    try:
        edit = erase(model, resolve(None, None, values), cache=EmbeddingCache(workshop / "cache"))
        assert all(np.isfinite(array).all() for array in edit.tensors.values())
        save_edit(file, edit)
        again = load_edit(file)
        assert again.id == edit.id
        edited = edited_weights(model, again)
    except ExciseError as error:
        message = str(error)
        assert message
        assert message.isprintable(), message
        assert len(message) < 1000
        return False
    assert edited.keys() == set(edit.sites)
    for name, weight in stored_arrays(model, edit.sites).items():
        assert edited[name].shape == weight.shape
        assert bool(edited[name].isfinite().all())
    return True


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow])
@given(values=recipes(texts, scales))
@example(values={"erase": ["gun"], "to": ["dog"], "keep": ["cat"], "method": "rece", "ridge": math.nan})
@example(values={"erase": ["gun"], "to": ["dog"], "keep": ["cat"], "method": "rece", "ridge": 5e-324})
@example(values={"erase": ["gun"], "to": ["dog"], "keep": ["cat"], "method": "uce", "erase_scale": 1e308})
@example(values={"erase": ["gun", "gun "], "keep": [], "method": "uce"})
@example(values={"erase": ["\ud800"], "keep": [], "method": "uce"})
@example(values={"erase": ["g" * 200], "keep": [], "method": "leace"})
def test_any_recipe_gives_an_edit_or_an_error(tiny_model: Path, workshop: Path, values: dict[str, Any]) -> None:
    attempt(tiny_model, workshop, values)


@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.too_slow])
@given(values=recipes(st.sampled_from(["gun", "cat", "sword", "dog", "a red cat"]), usual))
def test_scales_of_any_size_give_a_finite_edit(tiny_model: Path, workshop: Path, values: dict[str, Any]) -> None:
    attempt(tiny_model, workshop, values)
