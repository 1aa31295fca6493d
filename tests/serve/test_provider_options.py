"""Provider options: no two manifests or edits share an engine cache, and shapes are written as ONNX Runtime reads."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from excise.enginefile import Range
from excise.errors import UsageError
from excise.serve.provider_options import provider_options

CACHE = Path("cache")
TENSORRT, CUDA, CPU = "TensorrtExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider"
ONE, OTHER = "1" * 64, "2" * 64
hashes = st.text("0123456789abcdef", min_size=64, max_size=64)

PROFILE = {
    "sample": Range(min=(1, 4, 8, 8), opt=(2, 4, 8, 8), max=(8, 4, 8, 8)),
    "encoder_hidden_states": Range(min=(1, 77, 768), opt=(2, 77, 768), max=(8, 77, 768)),
}


def engine_cache(manifest: str, edit: str | None = None, component: str = "unet") -> str:
    chosen = dict(provider_options("tensorrt", manifest, CACHE, component=component, edit_id=edit))
    return chosen[TENSORRT]["trt_engine_cache_path"]


def test_each_provider_with_those_behind_it() -> None:
    names = [[name for name, _ in provider_options(one, ONE, CACHE)] for one in ("cpu", "cuda", "tensorrt")]
    assert names == [[CPU], [CUDA, CPU], [TENSORRT, CUDA, CPU]]


def test_only_tensorrt_keeps_engines() -> None:
    for provider in ("cpu", "cuda"):
        for _, options in provider_options(provider, ONE, CACHE, [PROFILE]):
            assert not [name for name in options if name.startswith("trt_")]
    (_, options), *_ = provider_options("tensorrt", ONE, CACHE, [PROFILE])
    assert options["trt_engine_cache_enable"] == options["trt_timing_cache_enable"] == "True"


@given(hashes, hashes, st.none() | hashes, st.none() | hashes)
def test_a_cache_is_shared_by_the_same_manifest_and_edit_alone(
    one: str, other: str, edit: str | None, another: str | None
) -> None:
    assert (engine_cache(one, edit) == engine_cache(other, another)) == ((one, edit) == (other, another))


def test_components_have_caches_of_their_own() -> None:
    paths = {engine_cache(ONE, component=name) for name in ("text_encoder", "unet", "vae_decoder")}
    assert len(paths) == 3


def test_times_of_kernels_are_shared() -> None:
    times = {
        dict(provider_options("tensorrt", manifest, CACHE, edit_id=edit))[TENSORRT]["trt_timing_cache_path"]
        for manifest in (ONE, OTHER)
        for edit in (None, ONE)
    }
    assert times == {str(CACHE / "timing")}


def test_shapes_are_written_as_onnx_runtime_reads_them() -> None:
    (_, options), *_ = provider_options("tensorrt", ONE, CACHE, [PROFILE])
    assert options["trt_profile_min_shapes"] == "sample:1x4x8x8,encoder_hidden_states:1x77x768"
    assert options["trt_profile_opt_shapes"] == "sample:2x4x8x8,encoder_hidden_states:2x77x768"
    assert options["trt_profile_max_shapes"] == "sample:8x4x8x8,encoder_hidden_states:8x77x768"


def test_several_profiles_repeat_the_inputs() -> None:
    (_, options), *_ = provider_options(
        "tensorrt", ONE, CACHE, [{"x": Range(min=(n,), opt=(n,), max=(n,))} for n in (1, 2)]
    )
    assert options["trt_profile_max_shapes"] == "x:1,x:2"


def test_without_profiles_no_shapes_are_given() -> None:
    (_, options), *_ = provider_options("tensorrt", ONE, CACHE)
    assert not [name for name in options if "profile" in name]


def test_devices() -> None:
    chosen = dict(provider_options("tensorrt", ONE, CACHE, device=1))
    assert chosen[TENSORRT]["device_id"] == chosen[CUDA]["device_id"] == "1"
    assert chosen[CPU] == {}


def test_nothing_is_written(tmp_path: Path) -> None:
    provider_options("tensorrt", ONE, tmp_path / "cache", [PROFILE])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"provider": "rocm"}, "unknown provider 'rocm': choose one of cpu, cuda, tensorrt"),
        ({"manifest_sha256": "../.."}, r"manifest_sha256='\.\./\.\.' isn't a SHA-256"),
        ({"manifest_sha256": ONE.replace("1", "A")}, "isn't a SHA-256"),
        ({"edit_id": "latest"}, "edit_id='latest' isn't a SHA-256"),
        ({"device": -1}, "device=-1"),
        ({"profiles": [PROFILE, {"sample": PROFILE["sample"]}]}, "profiles have different inputs"),
    ],
)
def test_what_cannot_be_used_is_refused(arguments: dict[str, object], message: str) -> None:
    given = {"provider": "tensorrt", "manifest_sha256": ONE, "cache_dir": CACHE, **arguments}
    with pytest.raises(UsageError, match=message):
        provider_options(**given)  # type: ignore[arg-type]


def test_float32_is_computed_in_float32_unless_asked() -> None:
    for tf32 in (False, True):
        assert dict(provider_options("cuda", None, None, tf32=tf32))[CUDA]["use_tf32"] == str(int(tf32))


def test_engines_that_cannot_be_told_apart_are_not_kept() -> None:
    for manifest, cache in ((None, CACHE), (ONE, None)):
        chosen = dict(provider_options("tensorrt", manifest, cache))
        assert not [name for name in chosen[TENSORRT] if "cache" in name]
