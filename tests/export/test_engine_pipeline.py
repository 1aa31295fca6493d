"""A folder's engines: shapes from its configurations, all or none, and a patch makes them stale."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from excise.edited_initializers import edited_initializers
from excise.editfile import Edit
from excise.enginefile import ENGINE, Range, TensorEntry, check_engine, read_engine
from excise.errors import ArtefactError, OutputError, UsageError
from excise.export import engine_build
from excise.export.engine_library import EngineLibrary
from excise.export.engine_options import PipelineOptions
from excise.export.engine_pipeline import _usual_profiles, build_engines, components
from excise.export.onnx_export import export_pipeline
from excise.export.onnx_graph import Graph
from excise.export.patch import patch
from excise.export.refit_plan import execute, refit_plan
from excise.manifest import read_manifest, verify, write_manifest
from tests.export.engines import edit_of, needs_rtx
from tests.export.fake_tensorrt import Engine, FakeTensorRt

COMPONENTS = ("text_encoder", "unet", "vae_decoder")


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def new_edit(tiny_model: Path, sites: tuple[str, ...]) -> Edit:
    return edit_of(tiny_model, sites)


@pytest.fixture(scope="module")
def patched(plain: Path, new_edit: Edit, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model's export with the edit. Not to be changed by tests."""
    out = tmp_path_factory.mktemp("patched") / "onnx"
    patch(plain, new_edit, out=out)
    return out


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeTensorRt:
    """A stand-in for tensorrt on a machine with a GPU."""
    monkeypatch.setattr(engine_build, "gpu_capability", lambda: "SM90")
    return FakeTensorRt()


@pytest.fixture
def tensorrt(fake: FakeTensorRt) -> EngineLibrary:
    return EngineLibrary("tensorrt", fake)


@pytest.fixture
def folder(patched: Path, tmp_path: Path) -> Path:
    """The patched tiny model's export, to be changed."""
    return shutil.copytree(patched, tmp_path / "onnx")


# --- the bundled model, by TensorRT-RTX --------------------------------------------------------------------------


@needs_rtx
def test_every_component_builds_by_the_usual_shapes(plain: Path, tmp_path: Path) -> None:
    options = PipelineOptions.model_validate({"images": {"max": 1}, "optimization_level": 0})
    entries = build_engines(plain, "tensorrt-rtx", options, out=tmp_path / "out")
    assert verify(tmp_path / "out") == []
    assert [check_engine(tmp_path / "out" / name / ENGINE) for name in entries] == [[], [], []]
    assert entries["unet"].profiles[0]["sample"] == Range(min=(1, 4, 8, 8), opt=(2, 4, 8, 8), max=(2, 4, 8, 8))


@pytest.mark.slow
@needs_rtx
def test_the_bundled_model_builds_for_two_gpus_without_any(demo_model: Path, tmp_path: Path) -> None:
    onnx = tmp_path / "onnx"
    export_pipeline(demo_model, onnx)
    options = PipelineOptions.model_validate(
        {"compute_capabilities": ["SM89", "SM120"], "images": {"opt": 2, "max": 8}}
    )
    entries = build_engines(onnx, "tensorrt-rtx", options)
    assert set(entries) == set(COMPONENTS)
    assert verify(onnx) == []
    for name, entry in entries.items():
        engine = onnx / name / ENGINE
        assert read_engine(engine) == entry
        assert check_engine(engine) == []
        assert entry.compute_capabilities == ("SM89", "SM120")
        assert {tensor.dtype for tensor in entry.outputs.values()} == {"float32"}
        assert engine.stat().st_size > (onnx / name / "model.onnx").stat().st_size
    width, tokens = json.loads((onnx / "text_encoder/config.json").read_text())["hidden_size"], 24
    channels = json.loads((onnx / "unet/config.json").read_text())["in_channels"]
    assert entries["text_encoder"].profiles == (
        {"input_ids": Range(min=(1, tokens), opt=(2, tokens), max=(8, tokens))},
    )
    assert entries["vae_decoder"].profiles == (
        {"latent_sample": Range(min=(1, channels, 8, 8), opt=(2, channels, 8, 8), max=(8, channels, 8, 8))},
    )
    assert entries["unet"].profiles == (
        {
            "sample": Range(min=(1, channels, 8, 8), opt=(4, channels, 8, 8), max=(16, channels, 8, 8)),
            "encoder_hidden_states": Range(min=(1, tokens, width), opt=(4, tokens, width), max=(16, tokens, width)),
        },
    )
    assert entries["text_encoder"].inputs["input_ids"].dtype == "int64"


# --- either library ----------------------------------------------------------------------------------------------


def test_the_manifest_takes_the_engines_in(folder: Path, fake: FakeTensorRt, tensorrt: EngineLibrary) -> None:
    before = read_manifest(folder)
    said: list[str] = []
    entries = build_engines(folder, tensorrt, PipelineOptions(refit=True), progress=said.append)
    manifest = read_manifest(folder)
    assert verify(folder) == []
    new = {f"{name}/{file}" for name in COMPONENTS for file in (ENGINE, f"{ENGINE}.json")}
    assert set(manifest.files) - set(before.files) == new
    assert {name: manifest.files[name] for name in before.files} == before.files
    assert (manifest.edit, manifest.base, manifest.parity) == (before.edit, before.base, before.parity)
    assert manifest.tools == {**before.tools, "tensorrt": "10.0-fake"}
    assert {name for name, entry in entries.items() if entry.refittable} == {"unet"}
    for name, place in manifest.weights.items():
        assert place.engine_weight == place.initializer == entries["unet"].refittable[name].engine_weight
    assert entries["unet"].edit == before.edit.id if before.edit else False
    assert said[1:] == [f"building {name}/model.engine with tensorrt 10.0-fake" for name in COMPONENTS]


def test_without_refit_no_weight_has_a_name_in_the_engine(folder: Path, tensorrt: EngineLibrary) -> None:
    build_engines(folder, tensorrt)
    assert {place.engine_weight for place in read_manifest(folder).weights.values()} == {None}


def test_a_new_folder_leaves_the_old_one_as_it_is(folder: Path, tensorrt: EngineLibrary, tmp_path: Path) -> None:
    (folder / "mine.txt").write_text("mine")
    before = contents(folder)
    build_engines(folder, tensorrt, out=tmp_path / "out")
    assert contents(folder) == before
    assert verify(tmp_path / "out") == []
    after = contents(tmp_path / "out")
    assert {name: after[name] for name in before if name != "excise.json"} == {
        name: data for name, data in before.items() if name != "excise.json"
    }


def test_engines_that_are_there_stay_unless_asked(folder: Path, fake: FakeTensorRt, tensorrt: EngineLibrary) -> None:
    build_engines(folder, tensorrt)
    before = contents(folder)
    with pytest.raises(OutputError, match=r"an engine of each of its models already: build them anew with --rebuild"):
        build_engines(folder, tensorrt)
    with pytest.raises(OutputError, match=r"built with other options: build it anew with --rebuild"):
        build_engines(folder, tensorrt, PipelineOptions(optimization_level=1))
    newer = FakeTensorRt()
    newer.__version__ = "10.1-fake"
    with pytest.raises(OutputError, match=r"built with other options"):
        build_engines(folder, EngineLibrary("tensorrt", newer))
    assert contents(folder) == before
    build_engines(folder, tensorrt, PipelineOptions(refit=True), rebuild=True)
    assert verify(folder) == []
    assert read_engine(folder / "unet" / ENGINE).refittable


def test_a_failing_build_leaves_the_folder_as_it_was(folder: Path, fake: FakeTensorRt, tensorrt: EngineLibrary) -> None:
    before = contents(folder)
    fake.unknown = {next(iter(read_manifest(folder).weights.values())).initializer}
    with pytest.raises(ArtefactError, match="can't be made refittable"):
        build_engines(folder, tensorrt, PipelineOptions(refit=True))
    assert fake.network.name == "excise.refittable", "the text encoder was built before the UNet failed"
    assert contents(folder) == before
    assert [path.name for path in folder.parent.iterdir()] == ["onnx"]


def test_a_patch_makes_the_unets_engine_stale(
    plain: Path, new_edit: Edit, tensorrt: EngineLibrary, tmp_path: Path
) -> None:
    build_engines(plain, tensorrt, out=tmp_path / "old")
    patch(tmp_path / "old", new_edit, out=tmp_path / "onnx")
    assert not (tmp_path / "onnx" / "unet" / ENGINE).exists()
    for name in (ENGINE, f"{ENGINE}.json"):
        shutil.copy(tmp_path / "old" / "unet" / name, tmp_path / "onnx" / "unet" / name)
    problems = {name: check_engine(tmp_path / "onnx" / name / ENGINE) for name in COMPONENTS}
    assert problems["text_encoder"] == problems["vae_decoder"] == []
    assert [problem.partition(": ")[2].partition(";")[0] for problem in problems["unet"]] == [
        "it was built from another edit.onnx_data",
        "it was built from another model.onnx",
    ]
    with pytest.raises(OutputError, match=r"is stale: .*, with --rebuild"):
        build_engines(tmp_path / "onnx", tensorrt)
    for name in (ENGINE, f"{ENGINE}.json"):
        (tmp_path / "onnx" / "unet" / name).unlink()
    said: list[str] = []
    build_engines(tmp_path / "onnx", tensorrt, progress=said.append)
    assert [line for line in said if line.startswith("building")] == [
        "building unet/model.engine with tensorrt 10.0-fake"
    ]
    kept = {name: (tmp_path / "old" / name / ENGINE).stat().st_ino for name in ("text_encoder", "vae_decoder")}
    assert kept == {name: (tmp_path / "onnx" / name / ENGINE).stat().st_ino for name in kept}
    assert verify(tmp_path / "onnx") == []
    assert check_engine(tmp_path / "onnx" / "unet" / ENGINE) == []
    assert read_engine(tmp_path / "onnx" / "unet" / ENGINE).edit == new_edit.id


def test_a_refit_leaves_the_weights_that_a_patch_writes(
    plain: Path, new_edit: Edit, tensorrt: EngineLibrary, tmp_path: Path
) -> None:
    entries = build_engines(plain, tensorrt, PipelineOptions(refit=True), out=tmp_path / "onnx")
    graph = Graph(plain / "unet/model.onnx")
    refittable = entries["unet"].refittable
    engine = Engine({place.engine_weight: graph.values(place.initializer) for place in refittable.values()})
    values = edited_initializers(plain, read_manifest(plain), new_edit)
    execute(refit_plan(refittable, {name: array for name, _, array in values}), engine, tensorrt)
    patch(plain, new_edit, out=tmp_path / "patched")
    patched = Graph(tmp_path / "patched/unet/model.onnx")
    for place in refittable.values():
        new = patched.values(place.initializer)
        np.testing.assert_array_equal(engine.weights[place.engine_weight], new)
        assert not np.array_equal(graph.values(place.initializer), new)


def test_profiles_of_a_component_take_the_place_of_the_usual_ones(
    folder: Path, fake: FakeTensorRt, tensorrt: EngineLibrary
) -> None:
    options = PipelineOptions.model_validate({"profiles": {"vae_decoder": [{"latent_sample": [3, 4, 16, 8]}]}})
    entries = build_engines(folder, tensorrt, options)
    assert entries["vae_decoder"].profiles[0]["latent_sample"].opt == (3, 4, 16, 8)
    assert entries["unet"].profiles[0]["sample"].opt == (2, 4, 8, 8)


def test_a_size_of_two_sides_is_height_and_width(folder: Path, tensorrt: EngineLibrary) -> None:
    path = folder / "unet/config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "sample_size": [8, 12]}))
    resign(folder)
    entries = build_engines(folder, tensorrt)
    assert entries["unet"].profiles[0]["sample"].max == (8, 4, 8, 12)
    assert entries["vae_decoder"].profiles[0]["latent_sample"].max == (4, 4, 8, 12)


def resign(folder: Path) -> None:
    """Write the manifest anew for a folder that a test changed."""
    old = read_manifest(folder)
    write_manifest(folder, kind=old.kind, base=old.base, edit=old.edit, weights=old.weights, tools=old.tools)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"profiles": {"vae": []}}, "'vae' is no component: these are text_encoder, unet, vae_decoder"),
        ({"profiles": {"unet": [{"sample": [2, 4, 8, 8]}]}}, r"unet/model.onnx lacks encoder_hidden_states"),
        ({"profiles": {"vae_decoder": [{"latent_sample": [2, 5, 8, 8]}]}}, "gives dimension 1 of latent_sample"),
        ({"compute_capabilities": ["SM89"]}, "tensorrt builds for the GPU that it runs on"),
    ],
)
def test_every_component_is_checked_before_the_first_build(
    options: dict[str, Any], message: str, patched: Path, fake: FakeTensorRt, tensorrt: EngineLibrary
) -> None:
    with pytest.raises(UsageError, match=message):
        build_engines(patched, tensorrt, PipelineOptions.model_validate(options))
    assert fake.network is None


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda folder: (folder / "unet/model.onnx").unlink(), r"has no unet/model.onnx: name a folder"),
        (lambda folder: (folder / "excise.json").unlink(), r"has no excise.json"),
        (lambda folder: (folder / "unet/config.json").write_text("{}"), r"unet/config.json was altered"),
    ],
)
def test_a_folder_that_is_not_whole_is_refused(
    spoil: Any, message: str, folder: Path, fake: FakeTensorRt, tensorrt: EngineLibrary
) -> None:
    spoil(folder)
    with pytest.raises(ArtefactError, match=message):
        build_engines(folder, tensorrt)
    assert fake.network is None


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (("text_encoder", "unet", "vae_decoder", "vae_encoder"), ("text_encoder", "unet", "vae_decoder")),
        (
            ("text_encoder", "text_encoder_2", "unet", "vae_decoder"),
            ("text_encoder", "text_encoder_2", "unet", "vae_decoder"),
        ),
        (("text_encoder", "transformer", "vae_decoder"), ("text_encoder", "transformer", "vae_decoder")),
        (("text_encoder", "vae_decoder"), "has no unet/model.onnx"),
        (("unet", "vae_decoder"), "has no text_encoder/model.onnx"),
    ],
)
def test_components_are_what_making_an_image_runs(
    names: tuple[str, ...], expected: tuple[str, ...] | str, tmp_path: Path
) -> None:
    for name in (*names, "scheduler"):
        (tmp_path / name).mkdir()
    for name in names:
        (tmp_path / name / "model.onnx").touch()
    if isinstance(expected, tuple):
        assert components(tmp_path) == expected
    else:
        with pytest.raises(ArtefactError, match=expected):
            components(tmp_path)


INPUTS = {"sample": (-1, 4, -1, -1), "timestep": (), "encoder_hidden_states": (-1, -1, 32)}


@pytest.mark.parametrize(
    ("component", "shapes", "expected"),
    [
        ("unet", INPUTS, {"sample": (2, 4, 8, 8), "encoder_hidden_states": (2, 24, 32)}),
        ("unet", {**INPUTS, "timestep": (-1,), "time_ids": (-1, 6)}, {"timestep": (2,), "time_ids": (2, 6)}),
        ("unet", {"sample": (2, 4, -1, -1), "timestep": ()}, {"sample": (2, 4, 8, 8)}),
        ("unet", {"sample": (2, 4, 8, 8), "timestep": ()}, None),
        ("text_encoder", {"input_ids": (-1, 24)}, {"input_ids": (1, 24)}),
        ("unet", {"sample": (-1, 4, -1, 8)}, "a free shape in sample that images: doesn't give: give profiles"),
        ("unet", {"mask": (-1, 3)}, "a free shape in mask"),
        ("transformer", {"encoder_hidden_states": (-1, -1, 32)}, "a free shape in encoder_hidden_states"),
    ],
)
def test_the_usual_shapes(
    component: str, shapes: dict[str, tuple[int, ...]], expected: dict[str, tuple[int, ...]] | str | None, patched: Path
) -> None:
    inputs = {name: TensorEntry(dtype="float32", shape=shape) for name, shape in shapes.items()}
    arguments = (patched, component, inputs, PipelineOptions())
    if isinstance(expected, str):
        with pytest.raises(UsageError, match=expected):
            _usual_profiles(*arguments)
    elif expected is None:
        assert _usual_profiles(*arguments) == ()
    else:
        (profile,) = _usual_profiles(*arguments)
        assert {name: profile[name].opt for name in expected} == expected
        assert set(profile) == {name for name, shape in shapes.items() if -1 in shape}


def test_a_configuration_without_the_size_is_told(folder: Path, tensorrt: EngineLibrary) -> None:
    path = folder / "text_encoder/config.json"
    path.write_text("{}")
    resign(folder)
    with pytest.raises(ArtefactError, match="has no max_position_embeddings: give profiles with shapes of your own"):
        build_engines(folder, tensorrt)
