"""Options of an engine: defaults, YAML, and profiles that don't fit an ONNX file's inputs are refused at once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from excise.enginefile import Range, TensorEntry
from excise.errors import UsageError
from excise.export.engine_options import EngineOptions, PipelineOptions, check_profiles, read_options

ONNX = Path("unet/model.onnx")
INPUTS = {
    "sample": TensorEntry(dtype="float32", shape=(-1, 4, -1, -1)),
    "timestep": TensorEntry(dtype="float32", shape=()),
    "mask": TensorEntry(dtype="float32", shape=(3,)),
}
SAMPLE = Range(min=(1, 4, 8, 8), opt=(2, 4, 8, 8), max=(4, 4, 16, 16))
sizes = st.lists(st.integers(1, 9), min_size=0, max_size=4)


@given(sizes, sizes, sizes)
def test_a_range_is_three_ordered_shapes_of_one_rank(low: list[int], best: list[int], high: list[int]) -> None:
    ordered = len(low) == len(best) == len(high) and all(a <= b <= c for a, b, c in zip(low, best, high, strict=True))
    try:
        made = Range(min=tuple(low), opt=tuple(best), max=tuple(high))
    except ValidationError:
        assert not ordered
    else:
        assert ordered
        assert (made.min, made.opt, made.max) == (tuple(low), tuple(best), tuple(high))


def test_one_list_is_a_static_shape() -> None:
    assert Range.model_validate([2, 77]) == Range(min=(2, 77), opt=(2, 77), max=(2, 77))


def test_defaults_need_no_gpu_and_no_file() -> None:
    options = PipelineOptions()
    assert (options.refit, options.compute_capabilities, options.timing_cache) == (False, (), None)
    assert options.of_engine((), refit=True) == EngineOptions(refit=True)


def test_a_file_gives_options(tmp_path: Path) -> None:
    path = tmp_path / "engines.yaml"
    path.write_text(
        "images: {min: 1, opt: 2, max: 8}\n"
        "compute_capabilities: [SM89, SM120]\n"
        "refit: true\n"
        "workspace_mib: 512\n"
        "profiles:\n"
        "  unet:\n"
        "    - sample: {min: [1, 4, 8, 8], opt: [2, 4, 8, 8], max: [4, 4, 16, 16]}\n"
        "      encoder_hidden_states: [2, 77, 768]\n"
    )
    options = read_options(path, PipelineOptions)
    assert (options.images.opt, options.images.max) == (2, 8)
    assert options.compute_capabilities == ("SM89", "SM120")
    assert options.profiles["unet"][0]["sample"] == SAMPLE
    assert options.profiles["unet"][0]["encoder_hidden_states"].max == (2, 77, 768)
    engine = options.of_engine((), refit=False)
    assert (engine.refit, engine.workspace_mib, engine.compute_capabilities) == (False, 512, ("SM89", "SM120"))


def test_an_empty_file_gives_the_defaults(tmp_path: Path) -> None:
    path = tmp_path / "engines.yaml"
    path.write_text("# nothing\n")
    assert read_options(path, PipelineOptions) == PipelineOptions()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("refits: true", "refits: Extra inputs are not permitted"),
        ("refit: 1", "refit: Input should be a valid boolean"),
        ("compute_capabilities: [8.9]", "compute_capabilities.0: Input should be a valid string"),
        ("compute_capabilities: [ampere]", r"compute_capabilities.0: String should match pattern '\^SM"),
        ("optimization_level: 6", "optimization_level: Input should be less than or equal to 5"),
        ("optimization_level: true", "optimization_level: Input should be a valid integer"),
        ("images: {min: 3, opt: 2}", "images: isn't min <= opt <= max: 3, 2, 4"),
        ("images: {min: 0}", "images.min: Input should be greater than or equal to 1"),
        (
            "profiles: {unet: [{sample: {min: [2], opt: [1], max: [4]}}]}",
            "0 isn't min <= opt <= max: 2, 1, 4",
        ),
        ("profiles: {unet: [{sample: {min: [1], opt: [1, 2], max: [4]}}]}", "have 1, 2 and 1 dimensions"),
        ("profiles: {unet: [{sample: [0]}]}", "profiles.unet.0.sample.min.0: Input should be greater"),
        ("- refit", "isn't a file of engine options"),
        ("refit: [", "isn't YAML"),
        ("refit: \xff", "isn't YAML"),
    ],
)
def test_what_a_file_gets_wrong_is_one_line(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "engines.yaml"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(UsageError, match=message) as caught:
        read_options(path, PipelineOptions)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_told(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="doesn't exist: name a file of engine options"):
        read_options(tmp_path / "none.yaml", PipelineOptions)
    with pytest.raises(UsageError, match="can't be read: Is a directory"):
        read_options(tmp_path, PipelineOptions)


def test_profiles_that_fit_are_taken() -> None:
    check_profiles(ONNX, INPUTS, ({"sample": SAMPLE}, {"sample": SAMPLE, "mask": Range(min=(3,), opt=(3,), max=(3,))}))
    check_profiles(ONNX, {"mask": INPUTS["mask"]}, ())


@pytest.mark.parametrize(
    ("profiles", "message"),
    [
        ((), r"has free shapes \(sample \[\?, 4, \?, \?\]\): give a profile"),
        (
            ({"sample": SAMPLE, "samples": SAMPLE},),
            "samples, which isn't an input: these are sample, timestep, mask",
        ),
        (({},), r"profile 0 of .* lacks sample \[\?, 4, \?, \?\]"),
        (({"sample": SAMPLE}, {}), "profile 1 of"),
        (({"sample": [1, 4, 8]},), r"gives sample \[\?, 4, \?, \?\] 3 dimensions, not 4"),
        (({"sample": [1, 3, 8, 8]},), "gives dimension 1 of sample .* 3 to 3: it is 4"),
        (
            ({"sample": SAMPLE, "mask": {"min": [1], "opt": [3], "max": [3]}},),
            r"0 of mask \[3\] 1 to 3: it is 3",
        ),
        (({"sample": SAMPLE, "timestep": [1]},), r"gives timestep \[\] 1 dimensions, not 0"),
    ],
)
def test_profiles_that_do_not_fit_are_refused(profiles: Any, message: str) -> None:
    options = EngineOptions.model_validate({"profiles": profiles})
    with pytest.raises(UsageError, match=message):
        check_profiles(ONNX, INPUTS, options.profiles)
