"""The edit file: round trip, fingerprints, and every way in which a file can be wrong."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from excise.editfile import Edit, fingerprint, load_edit, save_edit
from excise.editmetadata import EditMetadata, Erased, Kept, Stream
from excise.errors import EditError, FingerprintMismatch, NumericsError, OutputError

D = 6


def weights(dtype: str = "float32") -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {name: rng.standard_normal((4, D)).astype(dtype) for name in ("a.to_k.weight", "a.to_v.weight")}


def metadata() -> EditMetadata:
    return EditMetadata(
        excise_version="0",
        method="uce",
        recipe={"ridge": 0.1},
        concepts=(Erased(erase="gun", to="sunflower"),),
        kept=Kept.of(["cat"]),
        token_rule="all",
        family="stable-diffusion",
        streams=(Stream(name="text", dim=D, sites=tuple(weights())),),
        weights_fingerprint=fingerprint(weights()),
        text_encoder_fingerprint="0",
    )


def shared() -> Edit:
    return Edit(metadata(), {"text.transform": np.random.default_rng(1).standard_normal((D, D))})


def layerwise() -> Edit:
    rng = np.random.default_rng(2)
    tensors = {}
    for step in range(2):
        tensors[f"text.steps.{step}.shared"] = rng.standard_normal((D, D))
        tensors[f"text.steps.{step}.scaled"] = rng.standard_normal((3, D, D))
        tensors[f"text.steps.{step}.scalars"] = rng.standard_normal((2, 3))
    return Edit(metadata(), tensors)


@pytest.mark.parametrize("make", [shared, layerwise])
def test_round_trip(tmp_path: Path, make) -> None:  # type: ignore[no-untyped-def]
    edit = make()
    save_edit(tmp_path / "e.safetensors", edit)
    again = load_edit(tmp_path / "e.safetensors")
    assert again.id == edit.id
    assert again.metadata == edit.metadata
    for name, array in edit.tensors.items():
        np.testing.assert_array_equal(again.tensors[name], array)
    for name, weight in edit.apply(weights()).items():
        np.testing.assert_array_equal(again.apply(weights())[name], weight)


def test_apply_multiplies_from_the_right() -> None:
    edit = shared()
    for name, weight in edit.apply(weights()).items():
        assert weight.dtype == np.float32
        np.testing.assert_allclose(weight, weights()[name] @ edit.tensors["text.transform"], rtol=1e-5, atol=1e-5)


def test_layerwise_matrices_differ_by_site_and_multiply_in_order() -> None:
    edit = layerwise()
    expected = np.eye(D)
    for step in range(2):
        shared, scaled, scalars = (
            edit.tensors[f"text.steps.{step}.{part}"] for part in ("shared", "scaled", "scalars")
        )
        expected = expected @ (shared - sum(s * m for s, m in zip(scalars[1], scaled, strict=True)))
    np.testing.assert_allclose(edit.matrix("a.to_v.weight"), expected)
    assert not np.allclose(edit.matrix("a.to_k.weight"), expected)


def test_the_fingerprint_ignores_the_stored_precision_and_nothing_else() -> None:
    half = weights("float16")
    assert fingerprint(half) == fingerprint({name: w.astype(np.float32) for name, w in half.items()})
    assert fingerprint(half) != fingerprint(weights())
    assert fingerprint(weights()) != fingerprint({f"x.{name}": w for name, w in weights().items()})


def test_another_model_is_refused_unless_forced() -> None:
    other = {name: weight + 1 for name, weight in weights().items()}
    with pytest.raises(FingerprintMismatch, match="--force"):
        shared().apply(other)
    assert set(shared().apply(other, force=True)) == set(other)


def test_force_is_never_a_silent_no_op() -> None:
    with pytest.raises(FingerprintMismatch, match="not found"):
        shared().apply({}, force=True)
    with pytest.raises(FingerprintMismatch, match="6 wide"):
        shared().apply({name: np.zeros((4, D + 1), np.float32) for name in weights()}, force=True)


def test_overflow_in_half_precision_is_an_error() -> None:
    half = weights("float16")
    edit = Edit(
        metadata().model_copy(update={"weights_fingerprint": fingerprint(half)}), {"text.transform": np.eye(D) * 1e6}
    )
    with pytest.raises(NumericsError, match="float16"):
        edit.apply(half)


def test_bad_files(tmp_path: Path) -> None:
    path = tmp_path / "e.safetensors"
    with pytest.raises(EditError, match="not a file"):
        load_edit(path)
    save_edit(path, shared())
    with pytest.raises(OutputError, match="exists already"):
        save_edit(path, shared())
    half = tmp_path / "half.safetensors"
    half.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(EditError, match="half-written"):
        load_edit(half)
    plain = tmp_path / "plain.safetensors"
    save_file(load_file(path), plain)
    with pytest.raises(EditError, match="no excise metadata"):
        load_edit(plain)
    altered = tmp_path / "altered.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    altered.write_bytes(content)
    with pytest.raises(EditError, match="altered"):
        load_edit(altered)
    newer = tmp_path / "newer.safetensors"
    save_file(load_file(path), newer, {"excise": '{"format_version": 99}'})
    with pytest.raises(EditError, match="99"):
        load_edit(newer)


def test_a_delta_is_added_after_the_transform() -> None:
    delta = np.full((4, D), 0.5, np.float32)
    name = "a.to_k.weight"
    edit = Edit(metadata().model_copy(update={"deltas": (name,)}), {**shared().tensors, f"delta.{name}": delta})
    plain = shared().apply(weights())
    moved = edit.apply(weights())
    np.testing.assert_array_equal(moved[name], plain[name] + delta)
    np.testing.assert_array_equal(moved["a.to_v.weight"], plain["a.to_v.weight"])
    with pytest.raises(EditError, match="has no transform"):
        edit.matrix("other.weight")
    with pytest.raises(FingerprintMismatch, match="not found"):
        edit.apply({name: weights()[name]})


def test_many_kept_prompts_are_counted_and_not_listed() -> None:
    few, many = Kept.of(["a", "b"]), Kept.of(str(n) for n in range(1001))
    assert (few.count, few.prompts) == (2, ("a", "b"))
    assert (many.count, many.prompts) == (1001, ())
    assert Kept.of(["ab"]).sha256 != Kept.of(["a", "b"]).sha256


def test_an_absurd_header_is_refused_without_reading_it(tmp_path: Path) -> None:
    path = tmp_path / "huge.safetensors"
    path.write_bytes((2**40).to_bytes(8, "little") + b"{}")
    with pytest.raises(EditError, match="header is too large"):
        load_edit(path)
