"""A bank gives each request what the model with its edit baked in gives, and refuses what it can't stand for."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from onnx import TensorProto, helper

from excise.edit.erase import erase
from excise.edit.recipe import resolve
from excise.editfile import Edit
from excise.errors import ArtefactError, EditError, FingerprintMismatch, NumericsError, OutputError, UsageError
from excise.export.bank import BANK, BankDescription, add_bank
from excise.export.onnx_graph import Graph
from excise.export.parity import DenoiserInputs, torch_outputs
from excise.export.pipeline import load_pipeline
from excise.onnx_metadata import read_metadata
from tests.edit import tiny_models as tiny
from tests.export.text_edits import UNET, bake, baked_outputs, half, in_one_file, inputs_of, outputs, weights_of
from tests.export.unet_parity import text_states

CONCEPTS = (("gun", "sunflower"), ("a cat", "dog"), ("in the style of apple", "art"))
PROMPTS = ("a gun", "a cat", "an apple", "")


def make(model: Path, concept: str, target: str, **changes: Any) -> Edit:
    recipe = resolve(None, None, {"erase": (concept,), "to": (target,), "keep": ("blue",), "epochs": 1, **changes})
    return erase(model, recipe, certificate=False)


@pytest.fixture(scope="module")
def plain(plain: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model's export, its UNet in one file."""
    return in_one_file(plain, tmp_path_factory.mktemp("whole") / "onnx")


@pytest.fixture(scope="module")
def edits(tiny_model: Path) -> tuple[Edit, ...]:
    """Three edits of the tiny model."""
    return tuple(make(tiny_model, concept, target) for concept, target in CONCEPTS)


@pytest.fixture(scope="module")
def inputs(tiny_model: Path) -> dict[str, NDArray[Any]]:
    """The tiny UNet's inputs for four prompts."""
    return inputs_of(tiny_model, PROMPTS)


@pytest.fixture(scope="module")
def baked(
    plain: Path,
    edits: tuple[Edit, ...],
    inputs: dict[str, NDArray[Any]],
    tmp_path_factory: pytest.TempPathFactory,
) -> NDArray[np.float32]:
    """Outputs of the base and of every edit baked in, shape (1 + edits, prompts, …)."""
    return baked_outputs(plain / UNET, edits, inputs, tmp_path_factory.mktemp("baked"))


@pytest.fixture(scope="module")
def bank(plain: Path, edits: tuple[Edit, ...], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bank of the three edits, without the base."""
    out = tmp_path_factory.mktemp("bank") / "unet" / "model.onnx"
    add_bank(plain / UNET, out, edits)
    return out


@pytest.fixture(scope="module")
def run(bank: Path) -> Callable[..., NDArray[np.float32]]:
    session = onnxruntime.InferenceSession(str(bank), providers=["CPUExecutionProvider"])

    def go(inputs: dict[str, NDArray[Any]], index: Sequence[int]) -> NDArray[np.float32]:
        (found,) = session.run(None, {**inputs, "edit_index": np.array(index, np.int64)})
        return np.asarray(found, np.float32)

    return go


def test_every_edit_is_as_if_baked(
    run: Callable[..., NDArray[np.float32]], inputs: dict[str, NDArray[Any]], baked: NDArray[np.float32]
) -> None:
    for number in range(3):
        found = run(inputs, [number] * 4)
        assert np.abs(found - baked[1 + number]).max() < 1e-5
        # Each of the others, the base too, is far away.
        others = [other for row, other in enumerate(baked) if row != 1 + number]
        assert min(np.abs(found - other).max() for other in others) > 1e-2


def test_every_edit_is_as_pytorch_computes_it(
    tiny_model: Path, bank: Path, edits: tuple[Edit, ...], run: Callable[..., NDArray[np.float32]]
) -> None:
    pipe = load_pipeline(tiny_model)
    states = text_states(pipe, PROMPTS)
    sample = np.random.default_rng(1).standard_normal((len(PROMPTS), 4, 8, 8), np.float32)
    for number, edit in enumerate(edits):
        expected = torch_outputs(load_pipeline(tiny_model, edit).unet, DenoiserInputs(sample, (401,), states))[0]
        given = {"sample": sample, "timestep": np.array(401.0, np.float32), "encoder_hidden_states": states}
        assert np.abs(run(given, [number] * len(PROMPTS)) - expected).max() < 1e-5


@settings(max_examples=30, deadline=None)
@given(index=st.lists(st.one_of(st.integers(-5, 6), st.sampled_from([-(2**63), 2**63 - 1])), min_size=4, max_size=4))
def test_requests_of_one_batch_choose_their_own(
    run: Callable[..., NDArray[np.float32]],
    inputs: dict[str, NDArray[Any]],
    baked: NDArray[np.float32],
    index: list[int],
) -> None:
    """Beyond the bank's rows, −1 included, there is NaN, in that request alone."""
    found = run(inputs, index)
    for place, number in enumerate(index):
        if 0 <= number < 3:
            assert np.abs(found[place] - baked[1 + number, place]).max() < 1e-5
        else:
            assert np.isnan(found[place]).all()


def test_swapped_indices_are_told_apart(
    run: Callable[..., NDArray[np.float32]], inputs: dict[str, NDArray[Any]], baked: NDArray[np.float32]
) -> None:
    found = run(inputs, [1, 0, 2, 2])
    right, swapped = (np.stack([baked[1 + n, p] for p, n in enumerate(row)]) for row in ([1, 0, 2, 2], [0, 1, 2, 2]))
    assert np.abs(found - right).max() < 1e-5
    assert (np.abs(found - swapped).reshape(4, -1).max(axis=1)[:2] > 1e-2).all()


def test_guidance_repeats_the_index(
    run: Callable[..., NDArray[np.float32]], inputs: dict[str, NDArray[Any]], baked: NDArray[np.float32]
) -> None:
    """The negative prompts' rows come first and carry the same edits."""
    states = inputs["encoder_hidden_states"]
    doubled = {
        "sample": np.concatenate([inputs["sample"]] * 2),
        "timestep": inputs["timestep"],
        "encoder_hidden_states": np.concatenate([states[[3, 3, 3, 3]], states]),
    }
    index = [2, 0, 1, 0]
    found = run(doubled, index * 2)[4:]
    assert np.abs(found - np.stack([baked[1 + n, p] for p, n in enumerate(index)])).max() < 1e-5
    with pytest.raises(Exception, match="/excise/encoder_hidden_states/MatMul"):
        run(doubled, index)


def test_the_base_is_there_only_if_asked_for(
    plain: Path,
    edits: tuple[Edit, ...],
    inputs: dict[str, NDArray[Any]],
    baked: NDArray[np.float32],
    run: Callable[..., NDArray[np.float32]],
    tmp_path: Path,
) -> None:
    description = add_bank(plain / UNET, tmp_path / "model.onnx", edits[:2], with_base=True)
    assert description.ids == (None, edits[0].id, edits[1].id)
    np.testing.assert_array_equal(outputs(tmp_path / "model.onnx", inputs, [0, 0, 0, 0]), baked[0])
    found = outputs(tmp_path / "model.onnx", inputs, [0, 1, 2, 3])
    assert np.abs(found[:3] - np.stack([baked[0, 0], baked[1, 1], baked[2, 2]])).max() < 1e-5
    assert np.isnan(found[3]).all()
    # Without it, no index comes near.
    for index in range(-4, 5):
        found = run(inputs, [index] * 4)
        assert np.isnan(found).all() or np.abs(found - baked[0]).max() > 1e-2


def test_what_the_file_says_of_itself(plain: Path, bank: Path, edits: tuple[Edit, ...], tmp_path: Path) -> None:
    description = add_bank(plain / UNET, tmp_path / "model.onnx", edits)
    assert (tmp_path / "model.onnx").read_bytes() == bank.read_bytes()
    ids = [edit.id for edit in edits]
    assert json.loads(read_metadata(bank)[BANK]) == ids == list(description.ids)
    assert [row.summary for row in description.rows] == [edit.summary for edit in edits]
    assert description.inputs == {"encoder_hidden_states": 32}
    assert description.base_compared
    assert BankDescription.model_validate_json(description.model_dump_json()) == description
    onnx.checker.check_model(str(bank), full_check=True)


def test_the_rest_of_the_graph_is_as_it_was(plain: Path, bank: Path, edits: tuple[Edit, ...]) -> None:
    before, after = Graph(plain / UNET), Graph(bank)
    own = [node for node in after.model.graph.node if not node.name.startswith("/excise/")]
    assert len(own) == len(before.model.graph.node)
    product = "/excise/encoder_hidden_states/Where_output_0"
    for old, new in zip(before.model.graph.node, own, strict=True):
        new.input[:] = [{product: "encoder_hidden_states"}.get(name, name) for name in new.input]
        assert old == new
    for name, tensor in before.initializers.items():
        assert after.initializers[name] == tensor
    assert all(node.startswith("/excise/") for node in after.readers["encoder_hidden_states"])
    shapes = {
        value.name: [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]
        for value in after.model.graph.input
    }
    assert shapes["edit_index"] == [shapes["encoder_hidden_states"][0]] == ["batch_size"]
    table = after.values("edit_transforms")
    assert (table.dtype, table.shape) == (np.float32, (3, 32, 32))
    for row, edit in zip(table, edits, strict=True):
        np.testing.assert_allclose(row.T + np.eye(32), edit.matrix(edit.sites[0]), atol=1e-6)


def test_external_data_comes_along_and_stays_as_it_is(
    plain: Path, edits: tuple[Edit, ...], inputs: dict[str, NDArray[Any]], baked: NDArray[np.float32], tmp_path: Path
) -> None:
    source = tmp_path / "source" / "model.onnx"
    source.parent.mkdir()
    whole = onnx.load(plain / UNET)
    onnx.save(whole, source, save_as_external_data=True, location="model.onnx_data", size_threshold=100)
    data = source.with_name("model.onnx_data")
    content, mode = data.read_bytes(), data.stat().st_mode
    copied, linked, beside = tmp_path / "new" / "model.onnx", tmp_path / "linked" / "m.onnx", source.with_name("b.onnx")
    for out in (copied, linked, beside):
        add_bank(source, out, edits, link=out is not copied)
        assert np.abs(outputs(out, inputs, [1] * 4) - baked[2]).max() < 1e-5
        assert (out.parent / "model.onnx_data").read_bytes() == content
    assert (data.stat().st_mode, data.stat().st_nlink) == (mode, 2)
    assert linked.with_name("model.onnx_data").samefile(data)
    onnx.checker.check_model(str(copied))
    assert sorted(one.name for one in (tmp_path / "new").iterdir()) == ["model.onnx", "model.onnx_data"]
    # A data file of that name, and one that is gone.
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "model.onnx_data").write_text("mine")
    with pytest.raises(OutputError, match=r"model\.onnx_data exists already"):
        add_bank(source, tmp_path / "taken" / "model.onnx", edits)
    assert [(one.name, one.read_text()) for one in (tmp_path / "taken").iterdir()] == [("model.onnx_data", "mine")]
    data.unlink()
    with pytest.raises(ArtefactError, match=r"model\.onnx_data is missing"):
        add_bank(source, tmp_path / "lost" / "model.onnx", edits)
    assert not (tmp_path / "lost").exists()


@pytest.mark.parametrize("keep_io_types", [False, True])
def test_a_half_precision_model_is_as_near_as_a_baked_one(
    plain: Path,
    edits: tuple[Edit, ...],
    inputs: dict[str, NDArray[Any]],
    baked: NDArray[np.float32],
    tmp_path: Path,
    keep_io_types: bool,
) -> None:
    base = half(plain / UNET, tmp_path / "half.onnx", keep_io_types=keep_io_types)
    description = add_bank(base, tmp_path / "bank.onnx", edits)
    assert not description.base_compared
    for number, edit in enumerate(edits):
        edited = bake(plain / UNET, edit, tmp_path / "edited.onnx")
        narrow = half(edited, tmp_path / f"{number}.onnx", keep_io_types=keep_io_types)
        exact = baked[1 + number]
        error, usual = (
            float(np.linalg.norm(found - exact) / np.linalg.norm(exact))
            for found in (outputs(tmp_path / "bank.onnx", inputs, [number] * 4), outputs(narrow, inputs))
        )
        assert error < 1.3 * usual < 3e-3  # measured: 0.9 to 1.1 times
    assert np.isnan(outputs(tmp_path / "bank.onnx", inputs, [-1, 3, 0, -3])[[0, 1, 3]]).all()


def test_a_half_precision_model_is_compared_with_the_weights_beside_it(
    plain: Path, edits: tuple[Edit, ...], tmp_path: Path
) -> None:
    from safetensors.numpy import save_file

    base = half(plain / UNET, tmp_path / "model.onnx")
    save_file(weights_of(plain / UNET, edits[0]), tmp_path / "base.safetensors")
    assert add_bank(base, tmp_path / "bank.onnx", edits).base_compared
    foreign = replace(edits[0], metadata=edits[0].metadata.model_copy(update={"weights_fingerprint": "0" * 64}))
    with pytest.raises(FingerprintMismatch, match="fingerprint differs"):
        add_bank(base, tmp_path / "other.onnx", [foreign])
    # A model that carries an edit differs from them.
    (tmp_path / "second").mkdir()
    edited = half(bake(plain / UNET, edits[0], tmp_path / "edited.onnx"), tmp_path / "second" / "model.onnx")
    shutil.copy(tmp_path / "base.safetensors", tmp_path / "second")
    with pytest.raises(FingerprintMismatch, match=f"carries edit {edits[0].id[:12]} already"):
        add_bank(edited, tmp_path / "other.onnx", edits[1:])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"technique": "tensor"}, r"has a matrix for each layer \(technique tensor\)"),
        ({"sites": {"projections": "k"}}, r"leaves /.*/attn2/to_v/MatMul and 3 more as they are"),
        ({"sites": {"layers": "^up_blocks"}}, r"leaves /.* as they are, and they read encoder_hidden_states too"),
    ],
)
def test_an_edit_that_is_no_transform_of_the_text_names_the_alternative(
    tiny_model: Path, plain: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    edit = make(tiny_model, "gun", "dog", **changes)
    with pytest.raises(EditError, match=message + r".*: bake it into the weights instead, with excise export --edit$"):
        add_bank(plain / UNET, tmp_path / "model.onnx", [edit])
    assert list(tmp_path.iterdir()) == []


def test_deltas_and_streams_apart_are_refused(plain: Path, edits: tuple[Edit, ...], tmp_path: Path) -> None:
    edit, site = edits[0], edits[0].sites[0]
    delta = np.zeros_like(weights_of(plain / UNET, edits[0])[site])
    moved = Edit(edit.metadata.model_copy(update={"deltas": (site,)}), {**edit.tensors, f"delta.{site}": delta})
    stream = edit.metadata.streams[0]
    keys, values = (
        stream.model_copy(update={"name": kind, "sites": tuple(s for s in stream.sites if f"to_{kind}" in s)})
        for kind in "kv"
    )
    matrix = edit.tensors["text.transform"]
    apart = Edit(
        edit.metadata.model_copy(update={"streams": (keys, values)}), {"k.transform": matrix, "v.transform": matrix}
    )
    with pytest.raises(EditError, match="moves 1 weights by deltas"):
        add_bank(plain / UNET, tmp_path / "model.onnx", [moved])
    with pytest.raises(EditError, match=r"leaves .*to_v/MatMul and 3 more"):
        add_bank(plain / UNET, tmp_path / "model.onnx", [apart])


def test_edits_of_other_models_are_refused(
    plain: Path, edits: tuple[Edit, ...], folder_of: Callable[..., Path], tmp_path: Path
) -> None:
    out = tmp_path / "model.onnx"
    foreign = make(folder_of(tiny.stable_diffusion), "gun", "dog")
    with pytest.raises(FingerprintMismatch, match="were made for different models or layers"):
        add_bank(plain / UNET, out, [edits[0], foreign])
    with pytest.raises(FingerprintMismatch, match="made for another model"):
        add_bank(plain / UNET, out, [foreign])
    narrow = edits[0].metadata.streams[0].model_copy(update={"dim": 24})
    small = Edit(edits[0].metadata.model_copy(update={"streams": (narrow,)}), {"text.transform": np.eye(24)})
    with pytest.raises(FingerprintMismatch, match=r"has shape \(\d+, 32\), the edit is 24 wide"):
        add_bank(plain / UNET, out, [edits[0], small])
    bake(plain / UNET, edits[0], tmp_path / "edited.onnx")
    with pytest.raises(FingerprintMismatch, match="made for another model"):
        add_bank(tmp_path / "edited.onnx", out, edits[1:])
    assert not out.exists()


def test_an_edit_on_top_of_another_goes_on_that(
    tiny_model: Path, plain: Path, edits: tuple[Edit, ...], inputs: dict[str, NDArray[Any]], tmp_path: Path
) -> None:
    from excise.edit.apply import apply_edit

    apply_edit(tiny_model, edits[0], tmp_path / "model")
    second = make(tmp_path / "model", "a cat", "dog")
    bake(plain / UNET, edits[0], tmp_path / "edited.onnx")
    add_bank(tmp_path / "edited.onnx", tmp_path / "bank.onnx", [second])
    expected = torch_outputs(
        load_pipeline(tmp_path / "model", second).unet,
        DenoiserInputs(inputs["sample"], (401,), inputs["encoder_hidden_states"]),
    )[0]
    assert np.abs(outputs(tmp_path / "bank.onnx", inputs, [0] * 4) - expected).max() < 1e-5


def test_what_cannot_be_a_bank_is_refused(plain: Path, bank: Path, edits: tuple[Edit, ...], tmp_path: Path) -> None:
    out = tmp_path / "out" / "model.onnx"
    with pytest.raises(UsageError, match="a bank of no edits"):
        add_bank(plain / UNET, out, [])
    with pytest.raises(UsageError, match=f"edit {edits[0].id[:12]} is given 2 times"):
        add_bank(plain / UNET, out, [edits[0], edits[1], edits[0]])
    with pytest.raises(ArtefactError, match="holds a bank already"):
        add_bank(bank, out, edits)
    with pytest.raises(OutputError, match="exists already"):
        add_bank(plain / UNET, plain / UNET, edits)
    with pytest.raises(ArtefactError, match="doesn't exist"):
        add_bank(tmp_path / "model.onnx", out, edits)
    with pytest.raises(ArtefactError, match=r"is not in .*text_encoder"):
        add_bank(plain / "text_encoder" / "model.onnx", out, edits)
    large = Edit(edits[0].metadata, {"text.transform": np.full((32, 32), 1e39)})
    with pytest.raises(NumericsError, match="isn't finite in float32"):
        add_bank(plain / UNET, out, [large])
    still = Edit(edits[0].metadata, {"text.transform": np.eye(32) + 1e-60})
    with pytest.raises(NumericsError, match="changes nothing in float32"):
        add_bank(plain / UNET, out, [still])
    assert not out.parent.exists()


@pytest.mark.parametrize("named", [True, False])
def test_another_reader_of_the_text_is_found(plain: Path, edits: tuple[Edit, ...], tmp_path: Path, named: bool) -> None:
    """Behind a Cast, and without a name: it would read what isn't edited in the baked model."""
    model = onnx.load(plain / UNET)
    model.graph.node.extend(
        [
            helper.make_node("Cast", ["encoder_hidden_states"], ["copied"], name="/copy" * named, to=TensorProto.FLOAT),
            helper.make_node("Abs", ["copied"], ["seen"], name="/unknown/Abs" * named),
        ]
    )
    onnx.save(model, tmp_path / "model.onnx")
    with pytest.raises(EditError, match=r"leaves (/unknown/Abs)? and 0 more as they are"):
        add_bank(tmp_path / "model.onnx", tmp_path / "bank.onnx", edits)


def test_control_flow_and_old_operators_are_refused(plain: Path, edits: tuple[Edit, ...], tmp_path: Path) -> None:
    model = onnx.load(plain / UNET)
    value = helper.make_tensor_value_info("branch", TensorProto.FLOAT, None)
    branch = helper.make_graph([helper.make_node("Identity", ["encoder_hidden_states"], ["branch"])], "b", [], [value])
    constant = helper.make_node("Constant", [], ["yes"], value=helper.make_tensor("yes", TensorProto.BOOL, [], [True]))
    model.graph.node.extend(
        [constant, helper.make_node("If", ["yes"], ["flows"], name="/If", then_branch=branch, else_branch=branch)]
    )
    onnx.save(model, tmp_path / "flow.onnx")
    with pytest.raises(ArtefactError, match="has control flow"):
        add_bank(tmp_path / "flow.onnx", tmp_path / "bank.onnx", edits)
    old = onnx.load(plain / UNET)
    old.opset_import[0].version = 12
    onnx.save(old, tmp_path / "old.onnx")
    with pytest.raises(ArtefactError, match="operator set 12"):
        add_bank(tmp_path / "old.onnx", tmp_path / "bank.onnx", edits)


def test_progress_is_told(plain: Path, edits: tuple[Edit, ...], tmp_path: Path) -> None:
    said: list[str] = []
    add_bank(plain / UNET, tmp_path / "model.onnx", edits, progress=said.append)
    assert [line.partition(" ")[0] for line in said] == ["reading", "comparing", "writing"]


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_two_kinds_of_text_are_multiplied_each_by_its_own(folder_of: Callable[..., Path], tmp_path: Path) -> None:
    """Stable Diffusion 3: the tokens, and one pooled vector for each prompt."""
    import torch
    from diffusers import SD3Transformer2DModel

    model = folder_of(tiny.stable_diffusion_3)
    edits = [make(model, "gun", "dog"), make(model, "cat", "sunflower")]
    assert {stream.name for stream in edits[0].metadata.streams} == {"context", "pooled"}
    transformer = SD3Transformer2DModel.from_pretrained(model / "transformer").eval()
    names = ("hidden_states", "encoder_hidden_states", "pooled_projections", "timestep")
    random = torch.Generator().manual_seed(0)
    shapes = ((3, 4, 8, 8), (3, 30, 64), (3, 36))
    given = (*(torch.randn(shape, generator=random) for shape in shapes), torch.tensor([401.0, 401.0, 401.0]))
    path = tmp_path / "model.onnx"
    torch.onnx.export(
        transformer,
        given,
        path,
        input_names=list(names),
        output_names=["out_sample"],
        dynamic_axes={name: {0: "batch_size"} for name in (*names, "out_sample")},
        opset_version=18,
        dynamo=False,
    )
    description = add_bank(path, tmp_path / "bank.onnx", edits)
    assert description.inputs == {"encoder_hidden_states": 64, "pooled_projections": 36}
    graph = Graph(tmp_path / "bank.onnx")
    assert graph.values("edit_transforms.pooled_projections").shape == (2, 36, 36)
    onnx.checker.check_model(str(tmp_path / "bank.onnx"), full_check=True)
    feed = {name: value.numpy() for name, value in zip(names, given, strict=True)}
    found = outputs(tmp_path / "bank.onnx", feed, [1, 0, 2])
    original = {name: value.clone() for name, value in transformer.state_dict().items()}
    for place, number in ((0, 1), (1, 0)):
        moved = edits[number].apply({site: original[site].numpy() for site in edits[number].sites})
        transformer.load_state_dict({**original, **{site: torch.from_numpy(value) for site, value in moved.items()}})
        with torch.no_grad():
            expected = transformer(*given[:3], given[3], return_dict=False)[0].numpy()
        assert np.abs(found[place] - expected[place]).max() < 1e-5
    assert np.isnan(found[2]).all()


@pytest.mark.slow
def test_two_edits_of_the_demo_model(demo_model: Path, tmp_path: Path) -> None:
    from excise.export.onnx_export import export_pipeline

    edits = [make(demo_model, "gun", "flower"), make(demo_model, "knife", "apple")]
    export_pipeline(demo_model, tmp_path / "onnx")
    add_bank(tmp_path / "onnx" / UNET, tmp_path / "bank.onnx", edits)
    inputs = inputs_of(demo_model, ("a gun", "a knife", "a cat"))
    baked = baked_outputs(tmp_path / "onnx" / UNET, edits, inputs, tmp_path)
    for index in ([0, 0, 0], [1, 1, 1], [0, 1, 0], [1, 0, 1]):
        expected = np.stack([baked[1 + number, place] for place, number in enumerate(index)])
        assert np.abs(outputs(tmp_path / "bank.onnx", inputs, index) - expected).max() < 1e-5
    assert np.abs(baked[1] - baked[2]).max() > 0.1
