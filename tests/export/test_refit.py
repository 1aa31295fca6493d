"""A refit is the patched folder with the engine that a build of it would be, or it changes nothing.

NVIDIA's calls are a stand-in's, whose engines hold real weights; what they compute is ONNX Runtime's.
"""

from __future__ import annotations

import shutil
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from excise.editfile import Edit
from excise.enginefile import ENGINE, check_engine, entry_path, read_engine
from excise.errors import (
    ArtefactError,
    ExciseError,
    FingerprintMismatch,
    NumericsError,
    OutputError,
    UsageError,
)
from excise.export import refit as refit_module
from excise.export.engine_library import EngineLibrary
from excise.export.engine_options import PipelineOptions
from excise.export.engine_pipeline import build_engines
from excise.export.onnx_export import export_pipeline
from excise.export.onnx_graph import Graph
from excise.export.patch import patch
from excise.export.pipeline import load_pipeline, read_weights
from excise.export.refit import refit
from excise.manifest import NAME, read_manifest, verify
from tests.export.refittable_tensorrt import OnnxExecution, RefittableTensorRt, weights_of
from tests.random_edits import random_edit

MakeEdit = Callable[..., Edit]


@pytest.fixture
def module() -> RefittableTensorRt:
    return RefittableTensorRt()


@pytest.fixture
def tensorrt(module: RefittableTensorRt) -> EngineLibrary:
    return EngineLibrary("tensorrt", module)


@pytest.fixture(autouse=True)
def gpu(plain: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine with a GPU."""
    monkeypatch.setattr("excise.export.engine_build.gpu_capability", lambda: "SM90")
    monkeypatch.setattr(refit_module, "gpu_capability", lambda: "SM90")
    monkeypatch.setattr(refit_module, "check_execution", lambda: None)
    monkeypatch.setattr(refit_module, "EngineExecution", OnnxExecution)
    monkeypatch.setattr(OnnxExecution, "onnx", plain / "unet/model.onnx")


@pytest.fixture(scope="module")
def make_edit(tiny_model: Path, sites: tuple[str, ...]) -> MakeEdit:
    weights = read_weights(load_pipeline(tiny_model).unet, sites)
    copies = {name: np.array(values) for name, values in weights.items()}

    def make(seed: int, *, sites: tuple[str, ...] | None = None, **options: Any) -> Edit:
        return random_edit({name: copies[name] for name in sites or copies}, seed, **options)

    return make


@pytest.fixture(scope="module")
def built(plain: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with refittable engines. Not to be changed by tests."""
    out = tmp_path_factory.mktemp("built") / "onnx"
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("excise.export.engine_build.gpu_capability", lambda: "SM90")
        library = EngineLibrary("tensorrt", RefittableTensorRt())
        build_engines(plain, library, PipelineOptions(refit=True), out=out)
    return out


@pytest.fixture
def folder(built: Path, tmp_path: Path) -> Path:
    """The tiny model with refittable engines, to be changed."""
    return shutil.copytree(built, tmp_path / "work" / "onnx")


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def unchanged(folder: Path) -> Iterator[None]:
    """After the test the folder is as it was before it, and nothing is beside it."""
    before = contents(folder)
    yield
    assert contents(folder) == before
    assert [path.name for path in folder.parent.iterdir()] == ["onnx"]


# --- what it writes ----------------------------------------------------------------------------------------------


def test_a_refit_is_a_patch_and_a_build_of_it(
    folder: Path, make_edit: MakeEdit, tensorrt: EngineLibrary, tmp_path: Path, unchanged: None
) -> None:
    edit, said = make_edit(1), list[str]()
    done = refit(folder, edit, tensorrt, out=tmp_path / "out", progress=said.append)
    patch(folder, edit, out=tmp_path / "rebuilt")
    build_engines(tmp_path / "rebuilt", tensorrt, PipelineOptions(refit=True), rebuild=True)
    ours, theirs = contents(tmp_path / "out"), contents(tmp_path / "rebuilt")
    del ours[NAME], theirs[NAME]
    assert ours == theirs, "the engine and its JSON too"
    assert ours["unet/model.engine"] != contents(folder)["unet/model.engine"]
    refitted, rebuilt = read_manifest(tmp_path / "out"), read_manifest(tmp_path / "rebuilt")
    assert refitted.model_copy(update={"parity": {}}) == rebuilt
    assert refitted == done.manifest
    assert set(refitted.parity) == {
        "unet_refit_relative",
        "unet_refit_max_abs",
        "unet_refit_edit_relative",
        "unet_refit_edit_max_abs",
    }
    assert done.parity.relative < 1e-5
    assert done.parity.edit_relative > 0.01, "the edit moves the output"
    assert verify(tmp_path / "out") == check_engine(tmp_path / "out/unet" / ENGINE) == []
    assert read_engine(tmp_path / "out/unet" / ENGINE) == done.entry
    assert done.entry.edit == edit.id
    assert said == [
        f"checking {folder}/unet/model.engine",
        f"writing {edit.summary}",
        "running the patched ONNX model on the CPU",
        "refitting 8 weights with tensorrt 10.0-fake",
        "comparing the refitted engine with the patched ONNX model",
        "writing the engine",
    ]


def test_the_engine_has_the_patched_files_weights(
    folder: Path, make_edit: MakeEdit, tensorrt: EngineLibrary, plain: Path, tmp_path: Path
) -> None:
    done = refit(folder, make_edit(1), tensorrt)
    patch(plain, make_edit(1), out=tmp_path / "patched")
    before, after = Graph(plain / "unet/model.onnx"), Graph(tmp_path / "patched/unet/model.onnx")
    weights = weights_of((folder / "unet" / ENGINE).read_bytes())
    assert set(weights) == {place.engine_weight for place in done.entry.refittable.values()}
    for name, values in weights.items():
        np.testing.assert_array_equal(values, after.values(name))
        assert not np.array_equal(values, before.values(name))


def test_in_place_leaves_versions_that_share_files_alone(
    built: Path, make_edit: MakeEdit, tensorrt: EngineLibrary, tmp_path: Path
) -> None:
    before = contents(built)
    refit(built, make_edit(1), tensorrt, out=tmp_path / "one")
    one = contents(tmp_path / "one")
    shutil.copytree(tmp_path / "one", tmp_path / "copy")
    (tmp_path / "one").chmod(0o750)
    refit(tmp_path / "one", make_edit(2), tensorrt)
    refit(tmp_path / "copy", make_edit(2), tensorrt, out=tmp_path / "two")
    assert contents(tmp_path / "one") == contents(tmp_path / "two") != one
    assert stat.S_IMODE((tmp_path / "one").stat().st_mode) == 0o750
    assert contents(built) == before
    assert contents(tmp_path / "copy") == one
    assert sorted(path.name for path in tmp_path.iterdir()) == ["copy", "one", "two"]


def test_there_and_back_leaves_nothing(folder: Path, make_edit: MakeEdit, tensorrt: EngineLibrary) -> None:
    some = tuple(name for name in make_edit(1).sites if "to_k" in name)
    refit(folder, make_edit(1, sites=some), tensorrt)
    first = contents(folder)
    refit(folder, make_edit(2), tensorrt)
    refit(folder, make_edit(1, sites=some), tensorrt)
    again = contents(folder)
    # The figures are relative to the engine before the refit, which was another.
    del first[NAME], again[NAME]
    assert first == again


@pytest.mark.slow
def test_float16_is_refitted_in_float16(
    tiny_model: Path, make_edit: MakeEdit, tensorrt: EngineLibrary, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export_pipeline(tiny_model, tmp_path / "fp16", dtype="fp16")
    monkeypatch.setattr(OnnxExecution, "onnx", tmp_path / "fp16/unet/model.onnx")
    folder = tmp_path / "engines"
    build_engines(tmp_path / "fp16", tensorrt, PipelineOptions(refit=True), out=folder)
    done = refit(folder, make_edit(1), tensorrt)
    assert {values.dtype.name for values in weights_of((folder / "unet" / ENGINE).read_bytes()).values()} == {"float16"}
    assert {one.dtype for one in done.entry.inputs.values()} == {"float16"}
    assert done.parity.relative < 1e-5
    assert verify(folder) == check_engine(folder / "unet" / ENGINE) == []


def test_files_of_the_users_own_come_along(folder: Path, make_edit: MakeEdit, tensorrt: EngineLibrary) -> None:
    (folder / "mine.txt").write_text("mine")
    refit(folder, make_edit(1), tensorrt)
    assert (folder / "mine.txt").read_text() == "mine"


def test_an_edit_for_other_weights_needs_force(
    folder: Path, make_edit: MakeEdit, tensorrt: EngineLibrary, sites: tuple[str, ...]
) -> None:
    foreign = random_edit({name: np.ones((16 if "down" in name else 32, 32), np.float32) for name in sites}, 1)
    before = contents(folder)
    with pytest.raises(FingerprintMismatch, match="made for another model"):
        refit(folder, foreign, tensorrt)
    assert contents(folder) == before
    assert refit(folder, foreign, tensorrt, force=True).entry.edit == foreign.id


def test_the_library_is_the_engines_own_by_default(
    folder: Path, make_edit: MakeEdit, tensorrt: EngineLibrary, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    monkeypatch.setattr(refit_module, "load_library", lambda name: asked.append(name) or tensorrt)
    refit(folder, make_edit(1))
    refit(folder, make_edit(2), "tensorrt")
    assert asked == ["tensorrt", "tensorrt"]


# --- what it refuses, before the engine is opened ------------------------------------------------------------------


def alter(folder: Path) -> None:
    (folder / "unet" / ENGINE).write_bytes(b"another engine")


def patch_behind(folder: Path) -> None:
    with (folder / "unet/edit.onnx_data").open("r+b") as stream:
        stream.write(b"\1")


def rewrite(**changes: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        engine = folder / "unet" / ENGINE
        entry_path(engine).write_text(read_engine(engine).model_copy(update=changes).to_json())

    return change


@pytest.mark.parametrize(
    ("spoil", "error", "message"),
    [
        (alter, ArtefactError, "model.engine was altered"),
        (patch_behind, ArtefactError, "model.engine is stale: it was built from another edit.onnx_data"),
        (lambda folder: (folder / "unet" / ENGINE).unlink(), ArtefactError, "model.engine doesn't exist: build it"),
        (lambda folder: entry_path(folder / "unet" / ENGINE).unlink(), ArtefactError, "has no model.engine.json"),
        (lambda folder: (folder / NAME).unlink(), ArtefactError, "has no excise.json"),
        (rewrite(refittable={}), UsageError, "can't be refitted: build it again with refit: true"),
        (rewrite(library="tensorrt_rtx"), UsageError, "was built by tensorrt_rtx, not tensorrt: leave --library out"),
        (rewrite(version="9.9"), UsageError, "built by tensorrt 9.9, and 10.0-fake is installed: install that version"),
        (rewrite(compute_capabilities=("SM89", "SM120")), UsageError, "is for SM89, SM120, and this .* GPU is SM90"),
        (rewrite(inputs={}), ArtefactError, "has no input sample"),
    ],
)
def test_a_folder_that_does_not_fit_is_refused(
    spoil: Callable[[Path], None],
    error: type[ExciseError],
    message: str,
    folder: Path,
    make_edit: MakeEdit,
    module: RefittableTensorRt,
    tensorrt: EngineLibrary,
) -> None:
    spoil(folder)
    before = contents(folder)
    with pytest.raises(error, match=message):
        refit(folder, make_edit(1), tensorrt)
    assert contents(folder) == before
    assert [path.name for path in folder.parent.iterdir()] == ["onnx"]
    assert module.opened == 0


def test_weights_of_another_engine_are_refused(
    folder: Path, make_edit: MakeEdit, tensorrt: EngineLibrary, module: RefittableTensorRt
) -> None:
    entry = read_engine(folder / "unet" / ENGINE)
    first, *others = entry.refittable
    rewrite(refittable={name: entry.refittable[name] for name in others})(folder)
    with pytest.raises(UsageError, match=f"{first} isn't a refittable weight of this engine"):
        refit(folder, make_edit(1), tensorrt)
    wrong = entry.refittable[first].model_copy(update={"dtype": "float16"})
    rewrite(refittable={**entry.refittable, first: wrong})(folder)
    with pytest.raises(UsageError, match=f"{first} is float32, and the engine's is float16"):
        refit(folder, make_edit(1), tensorrt)
    assert module.opened == 0


@pytest.mark.usefixtures("unchanged")
class TestTheMachine:
    """Nothing is opened and nothing changes where the machine, the library or the edit doesn't do."""

    def test_without_a_gpu(
        self, folder: Path, make_edit: MakeEdit, tensorrt: EngineLibrary, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(refit_module, "gpu_capability", lambda: None)
        with pytest.raises(UsageError, match=r"no NVIDIA GPU or driver \(libcuda.so.1\) is found: .* is for SM90"):
            refit(folder, make_edit(1), tensorrt)

    def test_without_memory_to_run_it_in(
        self, folder: Path, make_edit: MakeEdit, tensorrt: EngineLibrary, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def check() -> None:
            raise UsageError("no CUDA")

        monkeypatch.setattr(refit_module, "check_execution", check)
        with pytest.raises(UsageError, match="no CUDA"):
            refit(folder, make_edit(1), tensorrt)

    def test_a_library_that_would_not_refit_again(
        self, folder: Path, make_edit: MakeEdit, module: RefittableTensorRt, tensorrt: EngineLibrary
    ) -> None:
        module.SerializationFlag = object()
        with pytest.raises(UsageError, match=r"tensorrt 10.0-fake lacks SerializationFlag.INCLUDE_REFIT"):
            refit(folder, make_edit(1), tensorrt)
        assert module.opened == 0

    def test_an_unknown_library(self, folder: Path, make_edit: MakeEdit) -> None:
        with pytest.raises(UsageError, match="was built by tensorrt, not openvino"):
            refit(folder, make_edit(1), "openvino")

    def test_a_place_that_holds_something(
        self, folder: Path, make_edit: MakeEdit, tensorrt: EngineLibrary, built: Path, module: RefittableTensorRt
    ) -> None:
        with pytest.raises(OutputError, match="is not empty"):
            refit(folder, make_edit(1), tensorrt, out=built)
        assert module.opened == 0

    def test_an_edit_of_another_component(self, folder: Path, make_edit: MakeEdit, tensorrt: EngineLibrary) -> None:
        with pytest.raises(ArtefactError, match=r"transformer/model.engine doesn't exist"):
            refit(folder, make_edit(1, component="transformer"), tensorrt)

    def test_an_edit_that_overflows(self, folder: Path, make_edit: MakeEdit, tensorrt: EngineLibrary) -> None:
        with pytest.raises(NumericsError, match="isn't finite"):
            refit(folder, make_edit(1, scale=1e39), tensorrt)


def test_the_present_edit_is_refused(
    folder: Path, make_edit: MakeEdit, module: RefittableTensorRt, tensorrt: EngineLibrary
) -> None:
    edit = make_edit(1)
    refit(folder, edit, tensorrt)
    before = contents(folder)
    with pytest.raises(UsageError, match=rf"has these weights already \(its edit: {edit.id}\): nothing to refit"):
        refit(folder, edit, tensorrt)
    assert contents(folder) == before


# --- what it finds out afterwards ----------------------------------------------------------------------------------


@pytest.mark.usefixtures("unchanged")
class TestABadRefit:
    """The folder stays as it was where the engine isn't what it should be."""

    @pytest.mark.parametrize("kept", [lambda names: names, lambda names: names[::2], lambda names: names[:1]])
    def test_weights_that_stay_behind_are_caught(
        self, kept: Any, folder: Path, make_edit: MakeEdit, module: RefittableTensorRt, tensorrt: EngineLibrary
    ) -> None:
        places = read_engine(folder / "unet" / ENGINE).refittable
        module.kept = frozenset(kept([place.engine_weight for place in places.values()]))
        with pytest.raises(
            ArtefactError, match=r"the refit failed: the engine is .* of the edit's own movement"
        ) as told:
            refit(folder, make_edit(1), tensorrt)
        assert module.refitter.calls[-1] == ("refit_cuda_engine",), "it said that all went well"
        if len(module.kept) == len(places):
            assert "is 1 of the edit's own movement" in str(told.value)

    def test_new_weights_that_are_not_serialised_are_caught(
        self, folder: Path, make_edit: MakeEdit, module: RefittableTensorRt, tensorrt: EngineLibrary
    ) -> None:
        module.forgets = True
        with pytest.raises(ArtefactError, match="is 1 of the edit's own movement"):
            refit(folder, make_edit(1), tensorrt)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"again": False}, "couldn't be refitted again; nothing was written"),
            ({"asks": ("bias",)}, "the engine also asks for bias"),
            ({"fails": True}, "the engine wasn't refitted: tensorrt 10.0-fake says: no memory"),
            ({"unopened": 1}, "the engine can't be opened: tensorrt 10.0-fake says: the plan is of another version"),
            ({"unopened": 2}, "the engine can't be opened"),
        ],
    )
    def test_what_the_library_says(
        self,
        change: dict[str, Any],
        message: str,
        folder: Path,
        make_edit: MakeEdit,
        module: RefittableTensorRt,
        tensorrt: EngineLibrary,
        tmp_path: Path,
    ) -> None:
        for name, value in change.items():
            setattr(module, name, value)
        with pytest.raises(ArtefactError, match=message):
            refit(folder, make_edit(1), tensorrt, out=tmp_path / "out")
        assert not (tmp_path / "out").exists()

    def test_an_output_that_is_not_finite(
        self, folder: Path, make_edit: MakeEdit, tensorrt: EngineLibrary, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(OnnxExecution, "__call__", lambda self, feed: np.full_like(feed["sample"], np.nan))
        with pytest.raises(ArtefactError, match=r"the refit can't be checked .*aren't finite.*; nothing was written"):
            refit(folder, make_edit(1), tensorrt)


STAGES = (
    "check_engine",
    "load_library",
    "check_execution",
    "edited_initializers",
    "refit_plan",
    "check_inputs",
    "patch",
    "onnx_outputs",
    "open_engine",
    "execute",
    "serialized",
    "engine_outputs",
    "compare",
    "entry_of",
    "record_engines",
    "os.fsync",
)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("place", ["in place", "out"])
@pytest.mark.usefixtures("unchanged")
def test_an_interrupt_at_any_stage_leaves_nothing(
    stage: str,
    place: str,
    folder: Path,
    make_edit: MakeEdit,
    tensorrt: EngineLibrary,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def interrupted(*arguments: Any, **options: Any) -> Any:
        raise KeyboardInterrupt

    out = tmp_path / "out" if place == "out" else None
    library = None if stage == "load_library" else tensorrt
    monkeypatch.setattr(f"excise.export.refit.{stage}", interrupted)
    with pytest.raises(KeyboardInterrupt):
        refit(folder, make_edit(1), library, out=out)
    assert [path.name for path in tmp_path.iterdir()] == ["work"]
