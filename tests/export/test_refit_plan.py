"""A refit sends every weight, each time, in one order, and nothing that the engine didn't have."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from excise.enginefile import RefitEntry
from excise.errors import ArtefactError, NumericsError, UsageError
from excise.export.engine_library import EngineLibrary
from excise.export.refit_plan import execute, refit_plan
from tests.export.fake_tensorrt import Engine, FakeTensorRt

SHAPE = (4, 6)
NAMES = ("mid.to_k.weight", "mid.to_v.weight", "up.to_k.weight")


def entry(number: int, dtype: str = "float32") -> RefitEntry:
    # Engine names in another order than torch names.
    name = f"onnx::MatMul_{9 - number}"
    return RefitEntry(initializer=name, engine_weight=name, transposed=True, dtype=dtype, shape=SHAPE)


REFITTABLE = {name: entry(number) for number, name in enumerate(NAMES)}


def arrays(seed: int) -> dict[str, NDArray[Any]]:
    generator = np.random.default_rng(seed)
    return {name: generator.standard_normal(SHAPE).astype(np.float32) for name in NAMES}


def fake() -> tuple[FakeTensorRt, EngineLibrary]:
    module = FakeTensorRt()
    return module, EngineLibrary("tensorrt", module)


def held(seed: int) -> dict[str, NDArray[Any]]:
    """The arrays by their names in the engine."""
    return {REFITTABLE[name].engine_weight: values for name, values in arrays(seed).items()}


@given(st.permutations(NAMES), st.integers(0, 99))
def test_a_plan_is_all_weights_in_one_order(order: list[str], seed: int) -> None:
    values = arrays(seed)
    plan = refit_plan({name: REFITTABLE[name] for name in reversed(order)}, {name: values[name] for name in order})
    assert [weight.name for weight in plan.weights] == ["onnx::MatMul_7", "onnx::MatMul_8", "onnx::MatMul_9"]
    for weight, name in zip(plan.weights, reversed(NAMES), strict=True):
        assert weight.values is values[name]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda values: values.pop(NAMES[1]), UsageError, "all of its 3 weights, and mid.to_v.weight is missing"),
        (lambda values: values.update(more=values[NAMES[0]]), UsageError, "more isn't a refittable weight"),
        (lambda values: values.update({NAMES[0]: np.zeros((6, 4), np.float32)}), UsageError, r"has shape \(6, 4\)"),
        (lambda values: values.update({NAMES[0]: np.zeros(SHAPE, np.float16)}), UsageError, "is float16, and"),
        (lambda values: values.update({NAMES[0]: np.zeros(SHAPE, ">f4")}), UsageError, "is >f4, and"),
        (lambda values: values.update({NAMES[0]: np.zeros((6, 4), np.float32).T}), UsageError, "isn't contiguous"),
        (lambda values: values.update({NAMES[0]: np.full(SHAPE, np.nan, np.float32)}), NumericsError, "isn't finite"),
    ],
)
def test_what_does_not_fit_is_refused(change: Any, error: type[Exception], message: str) -> None:
    values = arrays(0)
    change(values)
    with pytest.raises(error, match=message):
        refit_plan(REFITTABLE, values)


def test_an_engine_without_refittable_weights_is_refused() -> None:
    with pytest.raises(UsageError, match="can't be refitted: build it with refit: true"):
        refit_plan({}, {})


def test_a_refit_sets_all_asks_what_is_missing_and_only_then_refits() -> None:
    module, library = fake()
    engine = Engine(held(1))
    execute(refit_plan(REFITTABLE, arrays(2)), engine, library)
    assert module.refitter.calls == [
        *(("set_named_weights", f"onnx::MatMul_{number}") for number in (7, 8, 9)),
        ("get_missing_weights",),
        ("refit_cuda_engine",),
    ]
    for name, values in held(2).items():
        np.testing.assert_array_equal(engine.weights[name], values)


def test_there_and_back_leaves_nothing() -> None:
    _, library = fake()
    engine = Engine(held(1))
    for seed in (2, 1):
        execute(refit_plan(REFITTABLE, arrays(seed)), engine, library)
    for name, values in held(1).items():
        np.testing.assert_array_equal(engine.weights[name], values)


def test_another_engines_weights_are_refused_before_anything_is_set() -> None:
    module, library = fake()
    weights = held(1)
    weights["onnx::MatMul_1"] = weights.pop("onnx::MatMul_7")
    with pytest.raises(ArtefactError, match="onnx::MatMul_1 is in the engine alone"):
        execute(refit_plan(REFITTABLE, arrays(2)), Engine(weights), library)
    assert module.refitter.calls == []


@pytest.mark.parametrize(
    ("engine", "message", "last"),
    [
        (Engine(held(1), asks=("bias",)), "also asks for bias", "get_missing_weights"),
        (Engine(held(1), fails=True), "the engine wasn't refitted: tensorrt 10.0-fake says: no memory", "refit_cuda"),
        (
            Engine({name: values.astype(np.float16) for name, values in held(1).items()}),
            "onnx::MatMul_7 was refused: .* onnx::MatMul_7 has another type",
            "set_named_weights",
        ),
    ],
)
def test_a_refit_that_fails_is_an_error(engine: Engine, message: str, last: str) -> None:
    module, library = fake()
    with pytest.raises(ArtefactError, match=message):
        execute(refit_plan(REFITTABLE, arrays(2)), engine, library)
    assert module.refitter.calls[-1][0].startswith(last)
