"""What a refitted engine is compared on, and when it is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from excise.enginefile import EngineEntry, Range, TensorEntry
from excise.errors import ArtefactError, ModelError
from excise.export.refit_check import TOLERANCE, _text_states, check_inputs, compare, engine_outputs
from excise.manifest import BaseEntry, FileEntry

SD = BaseEntry(name="tiny", pipeline="StableDiffusionPipeline")
XL = BaseEntry(name="xl", pipeline="StableDiffusionXLPipeline")
FLUX = BaseEntry(name="flux", pipeline="FluxPipeline")
UNET = {"sample": (-1, 4, 8, 8), "timestep": (), "encoder_hidden_states": (-1, 7, 32)}


def entry(
    shapes: dict[str, tuple[int, ...]], *, profile: dict[str, Range] | None = None, dtype: str = "float32"
) -> EngineEntry:
    return EngineEntry(
        excise="0",
        library="tensorrt",
        version="1",
        onnx="model.onnx",
        sources={},
        inputs={name: TensorEntry(dtype=dtype, shape=shape) for name, shape in shapes.items()},
        outputs={},
        profiles=(profile,) if profile else (),
        engine=FileEntry(size=0, sha256="0" * 64),
    )


PROFILE = {
    "sample": Range(min=(3, 4, 8, 8), opt=(4, 4, 8, 8), max=(8, 4, 8, 8)),
    "encoder_hidden_states": Range(min=(3, 7, 32), opt=(4, 7, 32), max=(8, 7, 32)),
}


def test_inputs_have_the_smallest_shapes_of_the_profile() -> None:
    inputs = check_inputs(entry(UNET, profile=PROFILE), SD, [])
    assert {name: array.shape for name, array in inputs.arrays().items()} == {
        "sample": (3, 4, 8, 8),
        "encoder_hidden_states": (3, 7, 32),
    }
    again = check_inputs(entry(UNET, profile=PROFILE), SD, [])
    np.testing.assert_array_equal(inputs.sample, again.sample)
    np.testing.assert_array_equal(inputs.encoder_hidden_states, again.encoder_hidden_states)
    other = check_inputs(entry(UNET, profile=PROFILE), SD, [], seed=9)
    assert not np.array_equal(inputs.sample, other.sample)


def test_what_else_a_family_reads_is_there() -> None:
    shapes = {**UNET, "sample": (2, 4, 8, 8), "encoder_hidden_states": (2, 7, 32), "timestep": (2,)}
    inputs = check_inputs(entry({**shapes, "text_embeds": (2, 5), "time_ids": (2, 6)}), XL, [])
    assert {name: array.shape for name, array in inputs.others.items()} == {"text_embeds": (2, 5), "time_ids": (2, 6)}
    packed = {"hidden_states": (1, 9, 16), "timestep": (1,), "encoder_hidden_states": (1, 7, 32), "img_ids": (9, 3)}
    inputs = check_inputs(entry(packed), FLUX, [])
    assert inputs.latents == "hidden_states"
    assert inputs.timesteps == pytest.approx((0.801, 0.401, 0.021)), "Flux's time runs from 0 to 1"


def test_an_engine_of_another_family_is_refused() -> None:
    with pytest.raises(ArtefactError, match="has no input hidden_states, which Flux reads"):
        check_inputs(entry(UNET, profile=PROFILE), FLUX, [])
    with pytest.raises(ModelError, match="can't be exported"):
        check_inputs(entry(UNET, profile=PROFILE), BaseEntry(name="x", pipeline="WanPipeline"), [])


@given(st.integers(0, 99), st.integers(1, 8))
def test_a_narrow_edit_moves_the_states_as_a_wide_one_does(seed: int, rank: int) -> None:
    """Half of the states' square lies in what the change reads; of normal states it would be rank / width."""
    generator = np.random.default_rng(seed)
    width = 96
    basis, _ = np.linalg.qr(generator.standard_normal((width, rank)))
    changes = [generator.standard_normal((40, rank)) @ basis.T for _ in range(3)]
    states = _text_states((2, 11, width), changes, np.random.default_rng(seed))
    assert states.dtype == np.float32
    rows = states.reshape(-1, width)
    share = float(np.square(rows @ basis).sum() / np.square(rows).sum())
    assert 0.4 < share < 0.75
    assert np.square(rows).mean() == pytest.approx(1, abs=0.2)
    normal = _text_states((2, 11, width), [], np.random.default_rng(seed)).reshape(-1, width)
    assert float(np.square(normal @ basis).sum() / np.square(normal).sum()) < rank / width + 0.15


@pytest.mark.parametrize("changes", [[], [np.zeros((4, 32))], [np.ones((4, 31))], [np.ones(32)]])
def test_changes_that_say_nothing_leave_normal_states(changes: list[NDArray[Any]]) -> None:
    states = _text_states((1, 50, 32), changes, np.random.default_rng(0))
    np.testing.assert_array_equal(
        states, np.random.default_rng(0).standard_normal((50, 32), dtype=np.float32).reshape(1, 50, 32)
    )


@pytest.mark.parametrize(("rank", "expected"), [((), ()), ((-1,), (3,))])
def test_every_timestep_is_run_in_the_engines_own_types(rank: tuple[int, ...], expected: tuple[int, ...]) -> None:
    described = entry({**UNET, "timestep": rank}, profile=PROFILE, dtype="float16")
    fed: list[dict[str, NDArray[Any]]] = []

    def execution(feed: dict[str, NDArray[Any]]) -> NDArray[np.float32]:
        fed.append(feed)
        return np.full((3, 4, 8, 8), float(feed["timestep"].flat[0]), np.float32)

    outputs = engine_outputs(execution, described, check_inputs(described, SD, []))  # type: ignore[arg-type]
    assert outputs.shape == (3, 3, 4, 8, 8)
    assert outputs[:, 0, 0, 0, 0].tolist() == [801, 401, 21]
    assert {array.dtype.name for feed in fed for array in feed.values()} == {"float16"}
    assert {feed["timestep"].shape for feed in fed} == {expected}


@given(st.integers(0, 99), st.floats(0, 2))
def test_the_tolerance_is_a_share_of_the_movement(seed: int, share: float) -> None:
    generator = np.random.default_rng(seed)
    before, expected, noise = (generator.standard_normal((3, 2, 4)) for _ in range(3))
    scale = np.linalg.norm(expected - before)
    after = expected + share * scale * noise / np.linalg.norm(noise)
    if share > TOLERANCE * (1 + 1e-9):
        with pytest.raises(ArtefactError, match="nothing was written, build the engine again"):
            compare(before, expected, after)
    elif share < TOLERANCE * (1 - 1e-9):
        assert compare(before, expected, after).relative == pytest.approx(share)


def test_an_engine_that_kept_its_weights_scores_one() -> None:
    generator = np.random.default_rng(0)
    before, expected = generator.standard_normal((2, 3, 4))
    with pytest.raises(ArtefactError, match="the engine is 1 of the edit's own movement"):
        compare(before, expected, before)
    with pytest.raises(ArtefactError, match=r"can't be checked \(the edit changes none of these outputs"):
        compare(expected, expected, expected)
