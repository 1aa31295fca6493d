"""Every family: each edited weight is found where the graph reads it, and the export computes the edited model."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import numpy_helper

from excise.editfile import Edit, fingerprint
from excise.editmetadata import EditMetadata, Erased, Kept, Stream
from excise.errors import FingerprintMismatch, ModelError, NumericsError, UsageError
from excise.export.denoisers import Denoiser, check_exportable, make_inputs
from excise.export.onnx_export import export_pipeline
from excise.export.options import ExportOptions, StaticShapes
from excise.export.parity import DenoiserInputs, onnx_outputs, torch_outputs
from excise.export.patch import patch
from excise.export.pipeline import apply_edit, load_pipeline, read_weights
from excise.manifest import NAME, Manifest, hash_file, read_manifest, verify
from excise.onnx_metadata import read_edit_id
from excise.parity import parity
from excise.serve.onnx_runtime import OnnxRuntime
from excise.serve.runtime import Request
from tests.edit import tiny_models

FolderOf = Callable[[Callable[[], Any]], Path]
BUILDERS = (
    tiny_models.stable_diffusion_xl,
    tiny_models.stable_diffusion_xl_refiner,
    tiny_models.stable_diffusion_3,
    tiny_models.stable_diffusion_3_without_t5,
    tiny_models.flux,
)
SITES = {"context_embedder.weight": "context", "time_text_embed.text_embedder.linear_1.weight": "pooled"}
HALF = ExportOptions(dtype="fp16", vae_dtype="fp16", opset=17)


def make_edit(weights: dict[str, NDArray[Any]], component: Any, scale: float = 0.1) -> Edit:
    """An edit by one random matrix for each stream; with scale 0 it changes nothing."""
    streams: dict[str, list[str]] = {}
    for site in weights:
        streams.setdefault(SITES.get(site, "text"), []).append(site)
    widths = {name: weights[sites[0]].shape[1] for name, sites in streams.items()}
    random = np.random.default_rng(7)
    metadata = EditMetadata(
        excise_version="0",
        method="uce",
        recipe={"scale": scale},
        concepts=(Erased(erase="gun", to=" "),),
        kept=Kept.of([]),
        token_rule="all",
        family="any",
        component=component,
        streams=tuple(Stream(name=name, dim=widths[name], sites=tuple(sites)) for name, sites in streams.items()),
        weights_fingerprint=fingerprint(weights),
        text_encoder_fingerprint="0",
    )
    return Edit(
        metadata,
        {f"{name}.transform": np.eye(d) + scale * random.standard_normal((d, d)) for name, d in widths.items()},
    )


@dataclass(frozen=True)
class Exported:
    """A tiny model, its edit, and its export with it. Not to be changed by tests."""

    model: Path
    folder: Path
    manifest: Manifest
    family: Denoiser
    weights: dict[str, NDArray[Any]]
    edit: Edit
    said: tuple[str, ...]

    @property
    def path(self) -> Path:
        return self.folder / self.family.component / "model.onnx"

    @cached_property
    def pipe(self) -> Any:
        return load_pipeline(self.model)

    def outputs(self, size: tuple[int, int] | None = None) -> tuple[DenoiserInputs, NDArray[Any], NDArray[Any]]:
        """Inputs, and what torch makes of them without the edit and with it."""
        inputs = make_inputs(self.pipe, self.family, ["a gun", ""], seed=5, timesteps=(501,), size=size)
        denoiser = getattr(self.pipe, self.family.component)
        edited = getattr(load_pipeline(self.model, self.edit), self.family.component)
        return inputs, torch_outputs(denoiser, inputs), torch_outputs(edited, inputs)


def export(model: Path, folder: Path, options: ExportOptions | None = None) -> Exported:
    pipe = load_pipeline(model)
    family = check_exportable(model, pipe)
    denoiser = getattr(pipe, family.component)
    weights = {name: np.array(value) for name, value in read_weights(denoiser, family.sites_of(denoiser)).items()}
    edit = make_edit(weights, family.component)
    said: list[str] = []
    manifest = export_pipeline(
        model, folder, edit=edit, options=options, prompts=("a gun", "a cat"), progress=said.append
    )
    return Exported(model, folder, manifest, family, weights, edit, tuple(said))


@pytest.fixture(scope="module", params=BUILDERS, ids=lambda builder: builder.__name__)
def exported(request: pytest.FixtureRequest, folder_of: FolderOf, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    return export(folder_of(request.param), tmp_path_factory.mktemp("families") / "onnx")


@pytest.fixture(scope="module")
def half(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """Stable Diffusion in fp16, its VAE in fp32."""
    return export(tiny_model, tmp_path_factory.mktemp("half") / "onnx", ExportOptions(dtype="fp16"))


@pytest.fixture(scope="module")
def half_flux(folder_of: FolderOf, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """Flux with everything in fp16, and another operator set."""
    return export(folder_of(tiny_models.flux), tmp_path_factory.mktemp("flux") / "onnx", HALF)


@pytest.fixture(scope="module")
def static(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    shapes = StaticShapes(batch=2, height=16, width=24)
    return export(tiny_model, tmp_path_factory.mktemp("static") / "onnx", ExportOptions(static=shapes))


def stored(path: Path) -> dict[str, dict[str, NDArray[Any]]]:
    """The initialisers that each node reads, by the onnx package alone."""
    model = onnx.load(path)
    values = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    return {node.name: {name: values[name] for name in node.input if name in values} for node in model.graph.node}


def types(folder: Path, component: str) -> dict[str, set[str]]:
    """Types of a component's inputs and outputs, and of its initialisers."""
    model = onnx.load(folder / component / "model.onnx", load_external_data=False)

    def name(number: int) -> str:
        return onnx.TensorProto.DataType.Name(number)

    return {
        "inputs": {name(value.type.tensor_type.elem_type) for value in model.graph.input},
        "outputs": {name(value.type.tensor_type.elem_type) for value in model.graph.output},
        "weights": {name(tensor.data_type) for tensor in model.graph.initializer},
    }


def check_sites(exported: Exported, dtype: type[np.floating[Any]]) -> None:
    """Every site's node reads W T, formed in float32 and rounded once."""
    nodes = stored(exported.path)
    assert set(exported.manifest.weights) == set(exported.edit.sites) == set(exported.weights)
    in_single = exported.edit.apply(exported.weights)
    for site, entry in exported.manifest.weights.items():
        assert entry.node.rpartition("/")[0].replace("/", ".") == "." + site.removesuffix(".weight")
        found = nodes[entry.node][entry.initializer]
        found = found.T if entry.transposed else found
        assert found.dtype == dtype
        np.testing.assert_array_equal(found, in_single[site].astype(dtype))
        exact = exported.weights[site].astype(np.float64) @ exported.edit.matrix(site)
        bound = 4 * np.finfo(dtype).eps * np.abs(exact).max()
        assert np.abs(found - exact).max() < bound
        assert np.abs(exported.weights[site] - exact).max() > 20 * bound


def test_every_edited_site_is_found_by_its_node_with_its_values(exported: Exported) -> None:
    check_sites(exported, np.float32)


def test_the_folder_is_whole_and_says_what_it_carries(exported: Exported) -> None:
    component = exported.family.component
    assert verify(exported.folder) == []
    assert read_edit_id(exported.path) == exported.edit.id
    assert exported.manifest.base.pipeline in exported.family.pipelines
    assert all(name.startswith(f"{component}/") for name in exported.manifest.base.weights)
    index = json.loads((exported.folder / "model_index.json").read_text())
    parts = {name for name, value in index.items() if isinstance(value, list) and value[0] is not None} - {"vae"}
    there = {path.parent.name for path in exported.folder.rglob("*.json")} - {exported.folder.name}
    assert there == parts | {"vae_encoder", "vae_decoder"}
    for part in parts:
        if part.startswith("tokenizer"):
            assert (exported.folder / part / "tokenizer.json").is_file()
    lines = [f"exporting {path.parent.name} to ONNX" for path in exported.folder.rglob("model.onnx")]
    assert sorted(lines) == sorted(line for line in exported.said if line.startswith("exporting"))


def test_the_export_computes_the_edited_model_and_the_unedited_one_does_not(exported: Exported, tmp_path: Path) -> None:
    assert exported.manifest.parity[f"{exported.family.component}_relative"] < 1e-3
    inputs, base, edited = exported.outputs()
    good = parity(base, edited, onnx_outputs(exported.path, inputs))
    assert good.edit_relative > 1e-3
    assert good.relative < 1e-3
    lost = tmp_path / "lost"
    patch(exported.folder, make_edit(exported.weights, exported.family.component, scale=0.0), out=lost)
    control = parity(base, edited, onnx_outputs(lost / exported.path.relative_to(exported.folder), inputs))
    assert control.relative == pytest.approx(1, abs=1e-2)


def test_other_sizes_and_lengths_run(exported: Exported) -> None:
    """The axes are dynamic: nothing of the traced size is left in the graph."""
    size = (6, 8) if exported.family.component == "transformer" else (12, 20)
    inputs, base, edited = exported.outputs(size)
    assert parity(base, edited, onnx_outputs(exported.path, inputs)).relative < 1e-3


# --- half precision ----------------------------------------------------------------------------------------------


def test_in_half_precision_the_edit_is_rounded_once(half: Exported, half_flux: Exported) -> None:
    check_sites(half, np.float16)
    check_sites(half_flux, np.float16)


def test_the_vae_stays_in_single_precision(half: Exported) -> None:
    for component in ("text_encoder", "unet"):
        found = types(half.folder, component)
        assert found["outputs"] == {"FLOAT16"}
        assert "FLOAT" not in found["weights"]
    for component in ("vae_encoder", "vae_decoder"):
        assert types(half.folder, component)["weights"] <= {"FLOAT", "INT64"}
        assert types(half.folder, component)["inputs"] == {"FLOAT"}
    assert types(half.folder, "unet")["inputs"] == {"FLOAT16"}
    assert json.loads((half.folder / "text_encoder" / "config.json").read_text())["dtype"] == "float16"


def test_everything_can_be_in_half_precision(half_flux: Exported) -> None:
    for component in ("vae_encoder", "vae_decoder"):
        assert types(half_flux.folder, component)["inputs"] == {"FLOAT16"}
        assert "FLOAT" not in types(half_flux.folder, component)["weights"]


def test_what_overflows_in_t5_stays_in_single_precision(half_flux: Exported) -> None:
    reads = stored(half_flux.folder / "text_encoder_2" / "model.onnx")
    products = {
        name: next(iter(read.values())).dtype for name, read in reads.items() if name.endswith("MatMul") and read
    }
    assert {dtype for name, dtype in products.items() if name.endswith("/wo/MatMul")} == {np.dtype(np.float32)}
    assert {dtype for name, dtype in products.items() if not name.endswith("/wo/MatMul")} == {np.dtype(np.float16)}


def test_parity_in_half_precision_is_measured_and_says_how(half: Exported, half_flux: Exported) -> None:
    for exported, component in ((half, "unet"), (half_flux, "transformer")):
        figures = exported.manifest.parity
        assert figures[f"{component}_fp16_computed_in_fp32"] == 1
        assert 1e-5 < figures[f"{component}_relative"] < 0.1
        assert any("computes fp16 in fp32" in line for line in exported.said)


def test_a_patch_of_a_half_precision_export_equals_a_fresh_one(half: Exported, tmp_path: Path) -> None:
    other = make_edit(half.weights, "unet", scale=0.05)
    patch(half.folder, other, out=tmp_path / "other")
    patch(tmp_path / "other", half.edit, out=tmp_path / "back")
    for name in read_manifest(half.folder).files:
        assert hash_file(tmp_path / "back" / name) == hash_file(half.folder / name), name
    data = "unet/edit.onnx_data"
    assert hash_file(tmp_path / "other" / data) != hash_file(half.folder / data)
    assert (tmp_path / "back" / NAME).is_file()


def test_the_whole_denoising_in_half_precision_is_close(
    half: Exported, edited: Path, plain: Path, tmp_path: Path
) -> None:
    """The mixed folder runs without torch; half precision moves the latents less than the edit does."""
    whole = tmp_path / "whole"
    patch(plain, half.edit, out=whole)
    requests = [Request("a gun", seed=1), Request("a cat", seed=1, index=1)]

    def run(folder: Path) -> tuple[NDArray[Any], NDArray[Any]]:
        runtime = OnnxRuntime(folder, threads=1)
        latents = runtime.denoise(requests, num_inference_steps=8, guidance_scale=3.0)
        return latents, runtime.decode(latents).astype(np.float64)

    (rounded, pictures), (exact, expected), (unedited, _) = run(half.folder), run(whole), run(plain)
    moved = np.linalg.norm(exact - unedited)
    assert 0 < np.linalg.norm(rounded - exact) < 0.05 * moved
    assert np.abs(pictures - expected).mean() < 2


def test_an_edit_beyond_half_precisions_range_is_refused(half: Exported, tmp_path: Path) -> None:
    with pytest.raises(NumericsError, match="isn't finite in fp16"):
        export_pipeline(half.model, tmp_path / "out", edit=make_edit(half.weights, "unet", scale=1e7), dtype="fp16")
    assert not (tmp_path / "out").exists()


# --- options -----------------------------------------------------------------------------------------------------


def test_the_operator_set_is_the_one_asked_for(half_flux: Exported, half: Exported) -> None:
    def opsets(folder: Path) -> set[int]:
        models = [onnx.load(path, load_external_data=False) for path in folder.rglob("model.onnx")]
        assert len(models) >= 4
        return {one.version for model in models for one in model.opset_import if one.domain in ("", "ai.onnx")}

    assert opsets(half_flux.folder) == {17}
    assert opsets(half.folder) != {17}


def test_static_shapes_are_real(static: Exported, half: Exported) -> None:
    def shapes(folder: Path) -> dict[str, dict[str, list[Any]]]:
        found = {}
        for path in folder.rglob("model.onnx"):
            graph = onnx.load(path, load_external_data=False).graph
            found[path.parent.name] = {
                value.name: [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]
                for value in [*graph.input, *graph.output]
            }
        return found

    fixed = shapes(static.folder)
    assert fixed["unet"]["sample"] == fixed["unet"]["out_sample"] == [2, 4, 8, 12]
    assert fixed["unet"]["encoder_hidden_states"] == [2, 24, 32]
    assert fixed["text_encoder"]["input_ids"] == [2, 24]
    assert fixed["vae_decoder"] == {"latent_sample": [2, 4, 8, 12], "sample": [2, 3, 16, 24]}
    assert fixed["vae_encoder"]["sample"] == [2, 3, 16, 24]
    for values in fixed.values():
        assert all(isinstance(size, int) and size > 0 for shape in values.values() for size in shape)
    assert "batch_size" in shapes(half.folder)["unet"]["sample"]
    assert json.loads((static.folder / "unet" / "config.json").read_text())["sample_size"] == [8, 12]


def test_parity_of_static_shapes_takes_as_many_batches_as_the_prompts_need(static: Exported) -> None:
    assert static.manifest.parity["unet_relative"] < 1e-3
    inputs = make_inputs(static.pipe, static.family, ["a gun", "", "a cat"], timesteps=(501,), size=(8, 12))
    base = torch_outputs(static.pipe.unet, inputs)
    moved = load_pipeline(static.model, static.edit).unet
    found = onnx_outputs(static.path, inputs)
    assert found.shape == (1, 3, 4, 8, 12)
    assert parity(base, torch_outputs(moved, inputs), found).relative < 1e-3


def test_a_size_that_the_family_does_not_have_is_refused(folder_of: FolderOf, tmp_path: Path) -> None:
    pipe = load_pipeline(folder_of(tiny_models.flux))
    from excise.export.components import fixed_sizes

    family = check_exportable("flux", pipe)
    pipe.vae_scale_factor = 8
    with pytest.raises(UsageError, match=r"static\.width 24: Flux makes images of multiples of 16"):
        fixed_sizes(pipe, family, StaticShapes(height=16, width=24))
    sizes = fixed_sizes(pipe, family, StaticShapes(height=16, width=32))
    assert sizes.latents == (2, 4)
    assert sizes.tokens == {"denoiser": 512, "text_encoder": 24, "text_encoder_2": 512}


# --- refusals ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("builder", [tiny_models.pixart, tiny_models.pixart_sigma, tiny_models.hidream])
def test_what_cannot_be_exported_is_refused_before_it_is_loaded(
    builder: Callable[[], Any], folder_of: FolderOf, tmp_path: Path
) -> None:
    said: list[str] = []
    with pytest.raises(ModelError, match=r"Pipeline, which can't be exported to ONNX: .*Stable Diffusion 3, Flux can$"):
        export_pipeline(folder_of(builder), tmp_path / "out", progress=said.append)
    assert said == []


def test_an_edit_of_another_denoiser_is_refused(folder_of: FolderOf, half: Exported, tmp_path: Path) -> None:
    with pytest.raises(FingerprintMismatch, match="this one has no unet"):
        export_pipeline(folder_of(tiny_models.flux), tmp_path / "out", edit=half.edit)
    assert not (tmp_path / "out").exists()


def test_a_pipeline_without_what_optimum_needs_is_refused(folder_of: FolderOf) -> None:
    pipe = load_pipeline(folder_of(tiny_models.flux))
    pipe.text_encoder_2 = None
    with pytest.raises(ModelError, match="m has no text_encoder_2: Flux can't be exported without it"):
        check_exportable("m", pipe)


def test_an_unused_edit_of_torch_weights_is_seen(half: Exported) -> None:
    """The torch side of the comparison is really edited: applying the edit twice isn't applying it once."""
    pipe = load_pipeline(half.model, half.edit)
    once = {name: np.array(value) for name, value in read_weights(pipe.unet, half.edit.sites).items()}
    apply_edit(pipe.unet, half.edit, force=True)
    assert any(
        not np.array_equal(once[name], value) for name, value in read_weights(pipe.unet, half.edit.sites).items()
    )
