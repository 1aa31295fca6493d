"""A correct export passes, and every wrong one is caught; the verdict's formula, prompts and names of sides."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from safetensors.numpy import load_file

from excise.edit.erase import erase
from excise.edit.recipe import resolve
from excise.editfile import Edit, save_edit
from excise.editmetadata import Erased
from excise.errors import ArtefactError, FingerprintMismatch, ModelError, NumericsError, UsageError
from excise.eval.onnx_precision import FORMATS, read_formats
from excise.eval.verification import Verification, verify
from excise.eval.verification_measures import Settings
from excise.eval.verification_prompts import NEUTRAL, Prompts, choose_prompts, picked
from excise.eval.verification_sides import open_side, parse_side
from excise.eval.verification_verdict import DEFAULTS, Limits, Thresholds, adjusted, judge_output
from excise.export.onnx_export import export_pipeline
from excise.export.pipeline import load_pipeline
from excise.manifest import read_manifest
from excise.serve.runtime import Request

Weights = dict[str, NDArray[Any]]
PROMPTS = Prompts({"erased": ("gun", "a gun"), "kept": ("cat",), "neutral": ("a red apple",)}, "the test")
SETTINGS = Settings(num_inference_steps=3, guidance_scale=5.0, timesteps=3)


def made(model: Path, *, erased: str, to: str) -> Edit:
    return erase(model, resolve(None, None, {"erase": [erased], "to": [to], "keep": ["cat"]}))


@pytest.fixture(scope="module")
def edit(tiny_model: Path) -> Edit:
    return made(tiny_model, erased="gun", to="sunflower")


@pytest.fixture(scope="module")
def edit_file(edit: Edit, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("edit") / "gun.safetensors"
    save_edit(path, edit)
    return path


@pytest.fixture(scope="module")
def plain(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("plain") / "onnx"
    export_pipeline(tiny_model, out)
    return out


@pytest.fixture(scope="module")
def exported(tiny_model: Path, edit: Edit, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("exported") / "onnx"
    export_pipeline(tiny_model, out, edit=edit)
    return out


Verify = Callable[..., Verification]


@pytest.fixture(scope="module")
def verified(tiny_model: Path, edit_file: Path) -> Verify:
    """``verified(B, A=…, base=…)``: by default against PyTorch with the edit in memory."""

    def run(b: Path | str, a: str | None = None, base: str | None = None, **options: Any) -> Verification:
        sides = [parse_side(text) for text in (a or f"torch:{tiny_model}?edit={edit_file}", str(b))]
        options = {"prompts": PROMPTS, "settings": SETTINGS, "load_pipeline": load_pipeline, **options}
        return verify(*sides, parse_side(base or f"torch:{tiny_model}"), **options)

    return run


@pytest.fixture
def rewritten(exported: Path, tmp_path: Path) -> Callable[..., Path]:
    """The export with other values of the edited weights (torch's shape), or another graph."""

    def write(
        change: Callable[[Weights, Weights], None] | None = None, graph: Callable[[Any], None] | None = None
    ) -> Path:
        folder = Path(shutil.copytree(exported, tmp_path / "rewritten"))
        path, manifest = folder / "unet" / "model.onnx", read_manifest(folder)
        model = onnx.load(path)
        tensors = {tensor.name: tensor for tensor in model.graph.initializer}
        places = manifest.weights
        weights = {name: numpy_helper.to_array(tensors[place.initializer]) for name, place in places.items()}
        weights = {name: array.T if places[name].transposed else array for name, array in weights.items()}
        if change is not None:
            change(weights, load_file(folder / "unet" / "base.safetensors"))
        for name, array in weights.items():
            stored = np.ascontiguousarray(array.T if places[name].transposed else array, np.float32)
            tensors[places[name].initializer].CopyFrom(numpy_helper.from_array(stored, places[name].initializer))
        if graph is not None:
            graph(model.graph)
        path.unlink()
        onnx.save(model, path)
        return folder

    return write


def keys_of(weights: Weights) -> list[str]:
    return sorted(name for name in weights if ".attn2.to_k." in name)


def least(weights: Weights) -> str:
    """The keys of the middle block."""
    return next(name for name in keys_of(weights) if name.startswith("mid_block"))


def test_a_correct_export_passes(verified: Verify, exported: Path, edit: Edit) -> None:
    done = verified(exported, edit=edit)
    assert done.passed
    assert {row.output for row in done.rows} == {"text_encoder", "denoiser", "vae_decoder", "latents", "images"}
    assert {row.at for row in done.rows if row.output == "latents"} == {1, 2, 3}
    assert {row.group for row in done.rows} == set(PROMPTS.groups)
    assert done.rounding == "float32"
    for row in done.rows:
        if row.output in ("text_encoder", "vae_decoder"):
            assert (row.moved, row.to_move) == (0, None)
        assert row.relative is not None
        assert row.relative < 2e-5  # 1.1e-6 was measured
    erased = [row for row in done.rows if row.group == "erased" and row.output == "denoiser"]
    assert all(row.to_move is not None and row.to_move < 1e-3 for row in erased)


def test_a_correct_export_passes_without_torch_on_either_side(verified: Verify, exported: Path, plain: Path) -> None:
    done = verified(exported, a=f"onnx:{exported}", base=f"onnx:{plain}")
    assert done.passed
    assert max(row.max_abs or 0 for row in done.rows) == 0


def test_rewriting_alone_changes_nothing(verified: Verify, rewritten: Callable[..., Path]) -> None:
    """The negative controls below fail for what they change, not for how they are written."""
    assert verified(rewritten()).passed


def unedited(weights: Weights, base: Weights) -> None:
    weights.update(base)


def one_unedited(weights: Weights, base: Weights) -> None:
    weights[least(weights)] = base[least(weights)]


def keys_and_values_swapped(weights: Weights, base: Weights) -> None:
    key = least(weights)
    value = key.replace("to_k", "to_v")
    weights[key], weights[value] = weights[value], weights[key]


def transposed(weights: Weights, base: Weights) -> None:
    assert weights[least(weights)].shape == (32, 32)
    weights[least(weights)] = weights[least(weights)].T


def two_sites_exchanged(weights: Weights, base: Weights) -> None:
    first, second = keys_of(weights)[:2]
    assert weights[first].shape == weights[second].shape
    weights[first], weights[second] = weights[second], weights[first]


def text_ignored(weights: Weights, base: Weights) -> None:
    weights.update({name: np.zeros_like(array) for name, array in weights.items()})


@pytest.mark.parametrize(
    "change",
    [unedited, one_unedited, keys_and_values_swapped, transposed, two_sites_exchanged, text_ignored],
    ids=lambda change: change.__name__,
)
def test_a_wrong_export_is_caught(
    verified: Verify, rewritten: Callable[..., Path], change: Callable[[Weights, Weights], None]
) -> None:
    done = verified(rewritten(change))
    assert not done.passed
    failed = {row.output for row in done.failures}
    assert "denoiser" in failed
    assert failed <= {"denoiser", "latents", "images"}, "the other components are right"
    assert all("B is off by" in row.reason for row in done.failures)
    if change is unedited:
        erased = [row.to_move for row in done.rows if row.output == "denoiser" and row.group == "erased"]
        assert erased == pytest.approx([1, 1, 1], abs=1e-3)


def test_another_edit_is_caught(
    verified: Verify, rewritten: Callable[..., Path], tiny_model: Path, tmp_path: Path, edit: Edit
) -> None:
    other = made(tiny_model, erased="bomb", to="flower")
    folder = rewritten(lambda weights, base: weights.update(other.apply(base)))
    assert not verified(folder).passed
    # and where the folder says so, before anything is measured
    with pytest.raises(FingerprintMismatch, match="carries the edit"):
        verified(folder, edit=other, a=f"onnx:{folder}")


def test_the_text_input_cut_off_in_the_graph_is_caught(verified: Verify, rewritten: Callable[..., Path]) -> None:
    def cut(graph: Any) -> None:
        for node in graph.node:
            node.input[:] = ["blank" if name == "encoder_hidden_states" else name for name in node.input]
        graph.initializer.append(numpy_helper.from_array(np.zeros(1, np.float32), "zero"))
        graph.node.insert(0, helper.make_node("Mul", ["encoder_hidden_states", "zero"], ["blank"], name="cut"))

    done = verified(rewritten(graph=cut))
    assert "denoiser" in {row.output for row in done.failures}


def test_half_precision_overflow_is_named(verified: Verify, rewritten: Callable[..., Path]) -> None:
    def overflow(graph: Any) -> None:
        """1e6 times the output, rounded to float16 and taken back, as an activation that is too large would be."""
        (last,) = [node for node in graph.node if "out_sample" in node.output]
        last.output[:] = ["whole"]
        for name, value in (("up", 1e6), ("down", 1e-6)):
            graph.initializer.append(numpy_helper.from_array(np.array(value, np.float32), name))
        graph.node.extend(
            [
                helper.make_node("Mul", ["whole", "up"], ["large"]),
                helper.make_node("Cast", ["large"], ["half"], to=TensorProto.FLOAT16),
                helper.make_node("Cast", ["half"], ["back"], to=TensorProto.FLOAT),
                helper.make_node("Mul", ["back", "down"], ["out_sample"]),
            ]
        )

    done = verified(rewritten(graph=overflow))
    worst = done.failures[0]
    assert "aren't finite" in worst.reason
    assert worst.relative is worst.to_move is worst.max_abs is None
    assert {"denoiser", "latents", "images"} == {row.output for row in done.failures}


def test_a_reference_that_is_not_finite_is_refused(verified: Verify, rewritten: Callable[..., Path]) -> None:
    def broken(weights: Weights, base: Weights) -> None:
        weights[least(weights)] = np.full_like(weights[least(weights)], np.nan)

    folder = rewritten(broken)
    with pytest.raises(NumericsError, match=r"the reference: latents on erased prompts, step 1: .* aren't finite"):
        verified(folder, a=f"onnx:{folder}")


def test_an_unedited_reference_is_refused(verified: Verify, tiny_model: Path, exported: Path) -> None:
    with pytest.raises(NumericsError, match="moves nothing on the erased prompts"):
        verified(exported, a=f"torch:{tiny_model}")


def test_half_precision_is_recognised_and_passes(verified: Verify, tiny_model: Path, edit_file: Path) -> None:
    done = verified(f"torch:{tiny_model}?edit={edit_file}&dtype=float16")
    assert done.rounding == "half"
    assert done.b.precision["unet"] == "float16"
    assert done.passed


def test_end_to_end_leaves_components_out(verified: Verify, exported: Path) -> None:
    assert {row.output for row in verified(exported, end_to_end=True).rows} == {"latents", "images"}


def test_what_cannot_be_compared_is_refused(
    verified: Verify, tiny_model: Path, exported: Path, edit: Edit, demo_model: Path, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=r"carries the edit .*name the unedited model"):
        verified(exported, base=f"onnx:{exported}")
    with pytest.raises(FingerprintMismatch, match="is for another model than --base"):
        verified(exported, edit=edit, a=f"onnx:{exported}", base=f"torch:{altered(tiny_model, tmp_path)}")
    with pytest.raises(UsageError, match="has latents of shape"):
        verified(exported, a=f"onnx:{exported}", base=f"torch:{demo_model}")


def altered(model: Path, place: Path) -> Path:
    """The model with one weight of the edit's other than it was."""
    from safetensors.numpy import save_file

    folder = Path(shutil.copytree(model, place / "altered"))
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    weights[least(weights)] = weights[least(weights)] + 1
    save_file(weights, file, {"format": "pt"})
    return folder


def test_another_scheduler_is_refused(verified: Verify, exported: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(exported, tmp_path / "pndm"))
    file = folder / "scheduler" / "scheduler_config.json"
    file.write_text(
        file.read_text().replace("DDIMScheduler", "PNDMScheduler").replace("{", '{"skip_prk_steps": true,', 1)
    )
    with pytest.raises(UsageError, match="other schedulers"):
        verified(folder)


def test_other_families_are_refused(folder_of: Callable[..., Path], exported: Path, verified: Verify) -> None:
    from tests.edit.tiny_models import stable_diffusion_3, stable_diffusion_xl_refiner

    with pytest.raises(ModelError, match="has transformer: verify compares Stable Diffusion 1, 2 and XL"):
        verified(exported, a=f"torch:{folder_of(stable_diffusion_3)}")
    with pytest.raises(ModelError, match="has no text_encoder: verify compares"):
        verified(exported, a=f"torch:{folder_of(stable_diffusion_xl_refiner)}")


def test_sides_by_name(tiny_model: Path, exported: Path, tmp_path: Path) -> None:
    assert str(parse_side(str(tiny_model))) == f"torch:{tiny_model}"
    assert str(parse_side(str(exported))) == f"onnx:{exported}"
    side = parse_side(f"onnx:{exported}?provider=cuda")
    assert (side.kind, side.options) == ("onnx", {"provider": "cuda"})
    assert parse_side(str(side)) == side
    assert parse_side("demo:model").folder.name == "model"
    (tmp_path / "empty").mkdir()
    cases = {
        "isn't a folder": str(tmp_path / "none"),
        "no pipeline with a UNet": str(tmp_path / "empty"),
        "onnx has no option 'dtype'": f"onnx:{exported}?dtype=float16",
        "provider='gpu' isn't one of cpu, cuda, tensorrt": f"onnx:{exported}?provider=gpu",
    }
    for message, text in cases.items():
        with pytest.raises(UsageError, match=message):
            parse_side(text)


def test_a_folder_that_is_no_pipeline_is_one_clear_error(verified: Verify, tmp_path: Path, exported: Path) -> None:
    with pytest.raises(ArtefactError, match=r"has no text_encoder/model\.onnx"):
        verified(exported, a=f"onnx:{tmp_path}")
    with pytest.raises(ModelError, match="is not a diffusers folder"):
        verified(exported, a=f"torch:{tmp_path}")


@pytest.mark.skipif("CUDAExecutionProvider" in onnxruntime.get_available_providers(), reason="this machine has CUDA")
def test_a_provider_that_is_not_there_is_told_before_anything_is_measured(verified: Verify, exported: Path) -> None:
    told: list[str] = []
    with pytest.raises(UsageError, match="no CUDAExecutionProvider"):
        verified(f"onnx:{exported}?provider=cuda", say=told.append)
    assert told == []


def test_prompts(edit: Edit) -> None:
    known = choose_prompts(edit=edit, summary=None, given={}, limit=4)
    assert known.groups == {"erased": ("gun",), "kept": ("cat",), "neutral": NEUTRAL}
    told = choose_prompts(edit=None, summary=edit.summary, given={}, limit=2)
    assert told.groups == {"erased": ("gun",), "neutral": (NEUTRAL[0], NEUTRAL[-1])}
    given = choose_prompts(edit=edit, summary=None, given={"erased": ["bomb"], "kept": [NEUTRAL[0]]}, limit=4)
    assert given.groups == {"erased": ("bomb",), "kept": NEUTRAL[:1], "neutral": NEUTRAL[1:]}
    with pytest.raises(UsageError, match="what was erased isn't known"):
        choose_prompts(edit=None, summary=None, given={}, limit=4)
    with pytest.raises(UsageError, match="--prompts 0"):
        choose_prompts(edit=edit, summary=None, given={}, limit=0)


@given(st.lists(st.text(max_size=6), min_size=1, max_size=3))
def test_concepts_are_read_back_from_a_summary(concepts: list[str]) -> None:
    summary = "rece: " + ", ".join(f"{concept!r} → {'x → y'!r}" for concept in concepts) + "; 3 kept"
    assert set(concepts) == set(choose_prompts(edit=None, summary=summary, given={}, limit=9).groups["erased"])
    assert Erased(erase=concepts[0], to="").erase == concepts[0]


@given(st.lists(st.text(max_size=2), max_size=30), st.integers(1, 8))
def test_picked_prompts_are_distinct_and_few(prompts: list[str], limit: int) -> None:
    chosen = picked(prompts, limit)
    distinct = list(dict.fromkeys(prompts))
    assert len(chosen) == len(set(chosen)) == min(limit, len(distinct))
    assert [one for one in distinct if one in chosen] == list(chosen)
    if distinct:
        assert chosen[0] == distinct[0]


LIMITS = Thresholds(
    component=Limits(max_to_move=0.1, max_relative=0.01), loop=Limits(max_to_move=0.2, max_relative=0.02)
)


@given(move=st.floats(0, 1), error=st.floats(0, 1), scale=st.sampled_from([1e-3, 1.0, 1e3]), seed=st.integers(0, 9))
def test_the_tolerance_is_the_larger_of_two(move: float, error: float, scale: float, seed: int) -> None:
    """An output passes where ‖B − A‖ is within either tolerance, whatever its scale."""
    random = np.random.default_rng(seed)
    units = [array / np.linalg.norm(array) for array in random.standard_normal((3, 4, 5))]
    a = scale * units[0]
    base, b = a + scale * move * units[1], a + scale * error * units[2]
    row = judge_output(("denoiser", "kept", 5), base, a, b, LIMITS)
    tolerance = max(0.1 * move, 0.01)
    if not np.isclose(error, tolerance, rtol=1e-6):
        assert row.passed == (error < tolerance)
        assert (row.used > 1) == (not row.passed)
    if not np.isclose(move, 0.1, rtol=1e-6):
        assert row.decided_by == ("to_move" if move > 0.1 else "relative")
    if not np.isclose(move, 0.01, rtol=1e-6):
        assert (row.to_move is None) == (move < 0.01)
    assert row.relative == pytest.approx(error, abs=1e-12)
    assert row.moved == pytest.approx(move, abs=1e-12)


def test_what_has_no_figure() -> None:
    ones = np.ones((2, 3), np.float32)
    row = judge_output(("images", "kept", None), 2 * ones, ones, ones * np.float32(np.inf), LIMITS)
    assert (row.passed, row.relative, row.reason) == (False, None, "6 of 6 values of B aren't finite")
    with pytest.raises(NumericsError, match="latents on kept prompts, step 2: the reference is all zeros"):
        judge_output(("latents", "kept", 2), ones, 0 * ones, ones, LIMITS)
    with pytest.raises(UsageError, match="other models"):
        judge_output(("latents", "kept", 2), ones, ones, ones[:1], LIMITS)


def test_thresholds_can_be_replaced() -> None:
    changed = adjusted(DEFAULTS["half"], max_to_move=0.5)
    assert (changed.component.max_to_move, changed.loop.max_to_move) == (0.5, 0.5)
    assert changed.loop.max_relative == DEFAULTS["half"].loop.max_relative
    with pytest.raises(UsageError, match="--max-relative 0: give"):
        adjusted(DEFAULTS["half"], max_relative=0)


def test_settings_are_checked() -> None:
    for settings, message in (
        ({"num_inference_steps": 0}, "--steps 0"),
        ({"timesteps": 0}, "--timesteps 0"),
        ({"seed": -1}, "--seed -1"),
        ({"guidance_scale": float("nan")}, "--guidance nan"),
    ):
        with pytest.raises(UsageError, match=message):
            Settings(**settings)  # type: ignore[arg-type]


@pytest.mark.parametrize("component", ["unet", "text_encoder", "vae_decoder"])
def test_formats_are_those_that_onnx_reads(plain: Path, component: str) -> None:
    path = plain / component / "model.onnx"
    graph = onnx.load(path, load_external_data=False).graph
    expected: dict[str, int] = {}
    for tensor in graph.initializer:
        name = FORMATS[tensor.data_type]
        expected[name] = expected.get(name, 0) + int(np.prod(tensor.dims))
    found = read_formats(path)
    assert found.initializers == expected
    assert set(found.inputs_outputs) == {
        FORMATS[one.type.tensor_type.elem_type] for one in (*graph.input, *graph.output)
    }


def test_formats_of_what_is_no_model(plain: Path, tmp_path: Path) -> None:
    whole = (plain / "unet" / "model.onnx").read_bytes()
    for content in (b"", b"junk", whole[: len(whole) // 2]):
        (tmp_path / "model.onnx").write_bytes(content)
        with pytest.raises(ArtefactError, match="ONNX model"):
            read_formats(tmp_path / "model.onnx")
    with pytest.raises(ArtefactError):
        read_formats(tmp_path / "none.onnx")


def test_exports_are_compared_without_torch(exported: Path, plain: Path) -> None:
    code = f"""
import sys
from excise.eval.verification import verify
from excise.eval.verification_measures import Settings
from excise.eval.verification_prompts import Prompts
from excise.eval.verification_sides import open_side, parse_side
sides = [parse_side(text) for text in ("onnx:{exported}", "onnx:{exported}", "onnx:{plain}")]
done = verify(*sides, Prompts({{"erased": ("gun",)}}, "test"), Settings(2, timesteps=1), None)
assert done.passed
assert "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("kind", ["onnx", "torch"])
def test_the_latents_of_every_step_end_in_those_that_are_decoded(kind: str, tiny_model: Path, plain: Path) -> None:
    folder = tiny_model if kind == "torch" else plain
    runtime: Any = open_side(parse_side(f"{kind}:{folder}"), load_pipeline).runtime
    runtime.batch_size = 2
    steps: list[NDArray[np.float32]] = []
    requests = [Request("a gun", index=index) for index in range(3)]
    final = runtime.denoise(requests, num_inference_steps=4, guidance_scale=3.0, on_step=steps.append)
    assert [len(latents) for latents in steps] == [2] * 4 + [1] * 4
    np.testing.assert_array_equal(np.concatenate([steps[3], steps[7]]), final)
    assert all(np.abs(steps[step] - steps[step + 1]).max() > 1e-3 for step in range(3))
