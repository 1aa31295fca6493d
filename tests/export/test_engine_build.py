"""Engines by the real TensorRT-RTX, on a CPU: what they carry, and that nothing half-built is left.

What TensorRT alone does (timing caches, refittable weights) runs against a stand-in that records the calls.
"""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from excise.editfile import Edit
from excise.enginefile import Range, check_engine, read_engine
from excise.errors import ArtefactError, OutputError, UsageError
from excise.export import engine_build
from excise.export.engine_build import build_engine
from excise.export.engine_library import EngineLibrary, load_library
from excise.export.engine_options import EngineOptions
from excise.export.engine_progress import BuildProgress, interruptible
from excise.export.onnx_graph import Graph
from excise.export.patch import patch
from excise.manifest import WeightEntry, hash_file, read_manifest
from tests.export.engines import STATIC, differing, edit_of, needs_rtx
from tests.export.fake_tensorrt import BuilderFlag, FakeTensorRt, MemoryPoolType

OPTIONS = EngineOptions(profiles=(STATIC,), compute_capabilities=("SM89",))


@pytest.fixture(scope="module")
def rtx() -> EngineLibrary:
    return load_library("tensorrt-rtx")


@pytest.fixture(scope="module")
def new_edit(tiny_model: Path, sites: tuple[str, ...]) -> Edit:
    return edit_of(tiny_model, sites)


@pytest.fixture(scope="module")
def patched(plain: Path, new_edit: Edit, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model's export with the edit. Not to be changed by tests."""
    out = tmp_path_factory.mktemp("patched") / "onnx"
    patch(plain, new_edit, out=out)
    return out


@pytest.fixture(scope="module")
def built(plain: Path, rtx: EngineLibrary, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The unedited tiny UNet's folder with its engine. Not to be changed by tests."""
    folder = tmp_path_factory.mktemp("built") / "unet"
    shutil.copytree(plain / "unet", folder)
    build_engine(folder / "model.onnx", folder / "model.engine", OPTIONS, rtx)
    return folder


def simple(folder: Path, operator: str = "Relu", dtype: type[np.generic] = np.float32) -> Path:
    """An ONNX file of one operator on an input [n, 4], with its weights beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    weight = numpy_helper.from_array(np.ones((4, 4), dtype), "w")
    nodes = [
        helper.make_node("MatMul", ["sample", "w"], ["y"], "mm"),
        helper.make_node(operator, ["y"], ["out_sample"], "last"),
    ]
    ends = [helper.make_tensor_value_info(name, weight.data_type, ("n", 4)) for name in ("sample", "out_sample")]
    graph = helper.make_graph(nodes, "graph", ends[:1], ends[1:], [weight])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    options = {"save_as_external_data": True, "location": "model.onnx_data", "size_threshold": 0}
    onnx.save(model, folder / "model.onnx", **options)
    return folder / "model.onnx"


SIMPLE = EngineOptions(profiles=({"sample": Range(min=(1, 4), opt=(2, 4), max=(3, 4))},), optimization_level=0)


# --- TensorRT-RTX ------------------------------------------------------------------------------------------------


@needs_rtx
def test_the_json_says_what_the_engine_is_and_was_built_from(built: Path, rtx: EngineLibrary) -> None:
    engine = built / "model.engine"
    entry = read_engine(engine)
    assert (entry.library, entry.version) == ("tensorrt_rtx", rtx.version)
    assert (entry.compute_capabilities, entry.edit, entry.refittable) == (("SM89",), None, {})
    assert {name: (one.dtype, one.shape) for name, one in entry.inputs.items()} == {
        "sample": ("float32", (-1, 4, -1, -1)),
        "timestep": ("float32", ()),
        "encoder_hidden_states": ("float32", (-1, -1, 32)),
    }
    assert {name: (one.dtype, one.shape) for name, one in entry.outputs.items()} == {
        "out_sample": ("float32", (-1, 4, -1, -1))
    }
    assert entry.profiles == (STATIC,)
    assert entry.settings == {"tf32": True, "optimization_level": 3, "workspace_mib": None}
    assert entry.sources["model.onnx"].sha256 == hash_file(built / "model.onnx")
    assert (entry.engine.size, entry.engine.sha256) == (engine.stat().st_size, hash_file(engine))
    assert check_engine(engine) == []
    assert b"excise.edit_id=none" in engine.read_bytes()


@needs_rtx
def test_the_engine_holds_the_edited_weights_and_no_others(
    built: Path, plain: Path, patched: Path, new_edit: Edit, rtx: EngineLibrary, tmp_path: Path
) -> None:
    """V's rows lie in an engine as they are in the ONNX file; K's are scaled."""
    build_engine(patched / "unet/model.onnx", tmp_path / "edited", OPTIONS, rtx)
    first, other = (built / "model.engine").read_bytes(), (tmp_path / "edited").read_bytes()
    assert read_engine(tmp_path / "edited").edit == new_edit.id
    assert f"excise.edit_id={new_edit.id}".encode() in other
    for name, place in read_manifest(patched).weights.items():
        if ".to_v." in name:
            before, after = (Graph(folder / place.file).values(place.initializer) for folder in (plain, patched))
            for old, new in zip(before, after, strict=True):
                assert old.tobytes() in first
                assert new.tobytes() in other
                assert old.tobytes() not in other
                assert new.tobytes() not in first


@needs_rtx
def test_two_builds_of_one_model_differ_in_little_more_than_nothing(rtx: EngineLibrary, tmp_path: Path) -> None:
    """So an engine's hash names one build, never what was built: the ONNX file's hash does that."""
    model = simple(tmp_path)
    made = [build_engine(model, tmp_path / name, SIMPLE, rtx) for name in ("one", "two")]
    assert made[0].sources == made[1].sources
    one, two = ((tmp_path / name).read_bytes() for name in ("one", "two"))
    assert differing(one, two) < 0.001 * len(one)


@needs_rtx
@pytest.mark.parametrize("targets", [(), ("SM75",), ("SM80", "SM86"), ("SM89", "SM120")])
def test_what_the_builder_is_told(targets: tuple[str, ...], plain: Path, rtx: EngineLibrary) -> None:
    options = EngineOptions(profiles=(STATIC,), compute_capabilities=targets, tf32=False, workspace_mib=64)
    network, _parser, builder = engine_build._parsed(plain / "unet/model.onnx", rtx)
    config = engine_build._configured(builder, network, options, rtx)
    flags, pools = rtx.module.BuilderFlag, rtx.module.MemoryPoolType
    assert network.get_flag(rtx.module.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    assert [config.get_compute_capability(i).name for i in range(config.num_compute_capabilities)] == list(targets)
    assert config.num_optimization_profiles == 1
    assert not config.get_flag(flags.TF32)
    assert config.get_memory_pool_limit(pools.WORKSPACE) == 64 << 20
    assert not any(config.get_flag(flag) for flag in (flags.REFIT, flags.REFIT_IDENTICAL, flags.REFIT_INDIVIDUAL))


@needs_rtx
@pytest.mark.parametrize("target", ["SM75", "SM80", "SM86", "SM89", "SM120"])
def test_every_target_builds_on_this_machine(target: str, rtx: EngineLibrary, tmp_path: Path) -> None:
    options = SIMPLE.model_copy(update={"compute_capabilities": (target,)})
    entry = build_engine(simple(tmp_path, dtype=np.float16), tmp_path / "e", options, rtx)
    assert entry.compute_capabilities == (target,)
    assert entry.inputs["sample"].dtype == entry.outputs["out_sample"].dtype == "float16"


@needs_rtx
def test_what_a_target_cannot_run_is_told_in_the_librarys_words(rtx: EngineLibrary, tmp_path: Path) -> None:
    options = SIMPLE.model_copy(update={"compute_capabilities": ("SM75",)})
    with pytest.raises(ArtefactError, match=r"Cannot compile operation 'mm' for Turing \(SM75\): FP32 GEMM"):
        build_engine(simple(tmp_path), tmp_path / "e", options, rtx)


@needs_rtx
def test_data_files_are_read_hashed_and_watched(rtx: EngineLibrary, tmp_path: Path) -> None:
    model = simple(tmp_path / "model")
    engine = tmp_path / "model" / "model.engine"
    entry = build_engine(model, engine, SIMPLE, rtx)
    assert set(entry.sources) == {"model.onnx", "model.onnx_data"}
    data = model.parent / "model.onnx_data"
    data.write_bytes(data.read_bytes()[::-1])
    assert check_engine(engine) == [f"{engine} is stale: it was built from another model.onnx_data; build it again"]


@needs_rtx
def test_several_profiles_and_static_shapes(rtx: EngineLibrary, tmp_path: Path) -> None:
    options = EngineOptions.model_validate({"profiles": [{"sample": [1, 4]}, {"sample": [8, 4]}]})
    entry = build_engine(simple(tmp_path), tmp_path / "e", options, rtx)
    assert [profile["sample"].max for profile in entry.profiles] == [(1, 4), (8, 4)]


@needs_rtx
def test_what_the_parser_refuses_is_an_error_and_leaves_nothing(rtx: EngineLibrary, tmp_path: Path) -> None:
    model = simple(tmp_path / "model", "StringNormalizer")
    with pytest.raises(ArtefactError, match=r"model.onnx can't be read: .*tensorrt_rtx 1\S* says: .*StringNormalizer"):
        build_engine(model, tmp_path / "out" / "e", SIMPLE, rtx)
    assert not (tmp_path / "out").exists()


@needs_rtx
def test_what_the_library_blames_on_its_caller_is_a_usage_error(rtx: EngineLibrary, tmp_path: Path) -> None:
    """The check of profiles leaves nothing to the library; without it, its own words come through."""
    model = simple(tmp_path / "model")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine_build, "check_profiles", lambda *_: None)
        with pytest.raises(UsageError, match=r"no engine could be built from .* no optimization profile") as caught:
            build_engine(model, tmp_path / "e", EngineOptions(), rtx)
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@needs_rtx
def test_ctrl_c_stops_the_build_and_leaves_nothing(
    plain: Path, rtx: EngineLibrary, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = []
    counted = BuildProgress.step_complete

    def interrupting(self: BuildProgress, name: str, step: int) -> bool:
        if not steps:
            os.kill(os.getpid(), signal.SIGINT)
        steps.append(name)
        return counted(self, name, step)

    monkeypatch.setattr(BuildProgress, "step_complete", interrupting)
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        build_engine(plain / "unet/model.onnx", tmp_path / "e", OPTIONS, rtx)
    assert 0 < len(steps) < 100
    assert list(tmp_path.iterdir()) == []
    assert signal.getsignal(signal.SIGINT) is before


@needs_rtx
def test_progress_rises_to_the_end(rtx: EngineLibrary, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    class Bar:
        n = 0.0

        def update(self, more: float) -> None:
            self.n += more
            seen.append(self.n)

    monkeypatch.setattr(engine_build, "tqdm", lambda **_: nullcontext(Bar()))
    said: list[str] = []
    build_engine(simple(tmp_path), tmp_path / "e", SIMPLE, rtx, progress=said.append)
    assert said == [f"building e from {tmp_path / 'model.onnx'}"]
    assert seen == sorted(seen)
    assert len(set(seen)) > 5
    assert seen[-1] == pytest.approx(1.0)


@needs_rtx
def test_without_a_gpu_a_refittable_engine_is_refused_with_the_reason(
    plain: Path, rtx: EngineLibrary, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_build, "gpu_capability", lambda: None)
    options = OPTIONS.model_copy(update={"refit": True})
    weights = read_manifest(plain).weights
    with pytest.raises(UsageError, match=r"refit: true needs a GPU: .* none is found; build on a machine with a GPU"):
        build_engine(plain / "unet/model.onnx", tmp_path / "e", options, rtx, weights=weights)
    assert list(tmp_path.iterdir()) == []


# --- either library, before any build ----------------------------------------------------------------------------


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeTensorRt:
    """A stand-in for tensorrt on a machine with a GPU."""
    monkeypatch.setattr(engine_build, "gpu_capability", lambda: "SM90")
    return FakeTensorRt()


@pytest.fixture
def tensorrt(fake: FakeTensorRt) -> EngineLibrary:
    return EngineLibrary("tensorrt", fake)


def weights(*names: str) -> dict[str, WeightEntry]:
    """Entries of weights ``w`` of the simple model."""
    return {
        name: WeightEntry(
            file="unet/model.onnx",
            node="mm",
            initializer=f"onnx::{name}",
            transposed=True,
            dtype="float16",
            shape=(4, 4),
            sha256="0" * 64,
        )
        for name in names
    }


def test_refittable_weights_are_marked_one_by_one(fake: FakeTensorRt, tensorrt: EngineLibrary, tmp_path: Path) -> None:
    options = SIMPLE.model_copy(update={"refit": True})
    entry = build_engine(simple(tmp_path), tmp_path / "e", options, tensorrt, weights=weights("k", "v"))
    assert fake.network.marked == ["onnx::k", "onnx::v"]
    assert fake.config.flags == {BuilderFlag.TF32, BuilderFlag.REFIT_INDIVIDUAL}
    assert {name: place.engine_weight for name, place in entry.refittable.items()} == {"k": "onnx::k", "v": "onnx::v"}
    assert (entry.refittable["k"].dtype, entry.refittable["k"].shape) == ("float16", (4, 4))
    assert fake.network.name == "excise.refittable"
    assert entry.compute_capabilities == ("SM90",)
    assert (entry.inputs["sample"].dtype, entry.outputs["out_sample"].dtype) == ("float16", "bf16")
    assert read_engine(tmp_path / "e") == entry


def test_without_refit_nothing_is_marked(fake: FakeTensorRt, tensorrt: EngineLibrary, tmp_path: Path) -> None:
    entry = build_engine(simple(tmp_path), tmp_path / "e", SIMPLE, tensorrt, weights=weights("k"))
    assert fake.network.marked == []
    assert fake.config.flags == {BuilderFlag.TF32}
    assert entry.refittable == {}


def test_weights_that_the_library_does_not_know_are_an_error(
    fake: FakeTensorRt, tensorrt: EngineLibrary, tmp_path: Path
) -> None:
    fake.unknown = {"onnx::v"}
    options = SIMPLE.model_copy(update={"refit": True})
    with pytest.raises(ArtefactError, match="v can't be made refittable: tensorrt finds no weights onnx::v"):
        build_engine(simple(tmp_path), tmp_path / "e", options, tensorrt, weights=weights("k", "v"))
    assert not (tmp_path / "e").exists()


def test_settings_reach_the_builder(fake: FakeTensorRt, tensorrt: EngineLibrary, tmp_path: Path) -> None:
    options = SIMPLE.model_copy(update={"tf32": False, "workspace_mib": 2, "optimization_level": 5})
    build_engine(simple(tmp_path), tmp_path / "e", options, tensorrt)
    assert fake.config.flags == set()
    assert fake.config.limits == {MemoryPoolType.WORKSPACE: 2 << 20}
    assert fake.config.builder_optimization_level == 5
    assert fake.config.profiles == [{"sample": ((1, 4), (2, 4), (3, 4))}]


def test_a_timing_cache_is_read_and_replaced(fake: FakeTensorRt, tensorrt: EngineLibrary, tmp_path: Path) -> None:
    cache, model = tmp_path / "times", simple(tmp_path / "model")
    options = SIMPLE.model_copy(update={"timing_cache": cache})
    build_engine(model, tmp_path / "1", options, tensorrt)
    assert cache.read_bytes() == b"times"
    build_engine(model, tmp_path / "2", options, tensorrt)
    assert cache.read_bytes() == b"timestimes"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "1.json", "2", "2.json", "model", "times"]


def test_a_file_that_is_no_timing_cache_is_left_alone(
    fake: FakeTensorRt, tensorrt: EngineLibrary, tmp_path: Path
) -> None:
    mine = tmp_path / "mine.txt"
    mine.write_text("mine")
    options = SIMPLE.model_copy(update={"timing_cache": mine})
    with pytest.raises(UsageError, match=r"isn't a timing cache of tensorrt 10.0-fake: name another file"):
        build_engine(simple(tmp_path / "model"), tmp_path / "e", options, tensorrt)
    assert mine.read_text() == "mine"
    assert not (tmp_path / "e").exists()


def test_a_build_that_fails_leaves_nothing_and_no_timing_cache(
    fake: FakeTensorRt, tensorrt: EngineLibrary, tmp_path: Path
) -> None:
    fake.build_error = "out of memory"
    options = SIMPLE.model_copy(update={"timing_cache": tmp_path / "times"})
    model = simple(tmp_path / "model")
    with pytest.raises(ArtefactError, match=r"no engine could be built from .* 10.0-fake says: out of memory"):
        build_engine(model, tmp_path / "e", options, tensorrt)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("taken", ["e", "e.json"])
def test_what_is_there_stays(taken: str, fake: FakeTensorRt, tensorrt: EngineLibrary, tmp_path: Path) -> None:
    model = simple(tmp_path / "model")
    (tmp_path / taken).write_text("mine")
    with pytest.raises(OutputError, match=f"{taken} exists already"):
        build_engine(model, tmp_path / "e", SIMPLE, tensorrt)
    assert fake.network is None
    assert [path.name for path in sorted(tmp_path.iterdir())] == [taken, "model"]
    assert (tmp_path / taken).read_text() == "mine"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"profiles": ()}, "has free shapes"),
        ({"compute_capabilities": ("SM89",)}, "tensorrt builds for the GPU that it runs on, not for SM89"),
        ({"refit": True}, "has no weights that an edit can move"),
    ],
)
def test_options_that_do_not_fit_are_refused_before_the_build(
    change: dict[str, Any], message: str, fake: FakeTensorRt, tensorrt: EngineLibrary, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=message):
        build_engine(simple(tmp_path / "m"), tmp_path / "e", SIMPLE.model_copy(update=change), tensorrt)
    assert fake.network is None


def test_tensorrt_needs_a_gpu(tensorrt: EngineLibrary, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_build, "gpu_capability", lambda: None)
    with pytest.raises(UsageError, match="none is found: take tensorrt-rtx"):
        build_engine(simple(tmp_path), tmp_path / "e", SIMPLE, tensorrt)


@needs_rtx
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"compute_capabilities": ("SM90",)}, "doesn't build for SM90, but SM120, SM121, SM75, SM80, SM86, SM89"),
        ({"compute_capabilities": ("SM89", "SM89")}, "SM89, SM89 names one twice"),
        ({"timing_cache": Path("times")}, "timing_cache: tensorrt-rtx has none"),
    ],
)
def test_what_rtx_does_not_do_is_refused(
    change: dict[str, Any], message: str, rtx: EngineLibrary, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=message):
        build_engine(simple(tmp_path / "m"), tmp_path / "e", SIMPLE.model_copy(update=change), rtx)


@needs_rtx
@pytest.mark.parametrize("options", [{}, {"refit": True}])
def test_a_gpu_that_rtx_does_not_run_on_is_told_before_the_build(
    options: dict[str, Any], rtx: EngineLibrary, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Seen on an H100: an engine is built without a word, and no runtime there opens it."""
    monkeypatch.setattr(engine_build, "gpu_capability", lambda: "SM90")
    with pytest.raises(UsageError, match=r"GPU is SM90, which tensorrt_rtx doesn't run on: .*SM89"):
        engine_build._check_targets(EngineOptions(**options), rtx, engine_build.gpu_capability())
    engine_build._check_targets(EngineOptions(), rtx, "SM130")
    engine_build._check_targets(EngineOptions(compute_capabilities=("SM89",)), rtx, "SM90")


@pytest.mark.parametrize("name", ["model.onnx", "model.onnx_data"])
def test_a_missing_file_is_told(name: str, tensorrt: EngineLibrary, tmp_path: Path) -> None:
    model = simple(tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(ArtefactError, match=rf"{name}(,| doesn't exist)"):
        build_engine(model, tmp_path / "e", SIMPLE, tensorrt)


# --- progress ----------------------------------------------------------------------------------------------------


def test_a_fraction_is_the_nested_position() -> None:
    progress = BuildProgress()
    progress.phase_start("all", None, 4)
    progress.step_complete("all", 0)
    assert progress.fraction == 0.25
    progress.phase_start("part", "all", 2)
    progress.step_complete("part", 0)
    assert progress.fraction == 0.375
    progress.phase_finish("part")
    progress.step_complete("gone", 0)
    assert progress.fraction == 0.5
    progress.step_complete("all", 1)
    assert progress.fraction == 0.5
    progress.phase_start("empty", "all", 0)
    progress.step_complete("empty", 0)
    assert progress.fraction == 0.75
    progress.phase_finish("all")
    assert progress.fraction == 1.0


def test_an_interrupt_is_noted_and_raised_at_the_end() -> None:
    progress = BuildProgress()
    progress.phase_start("all", None, 2)
    going_on = []

    def work() -> None:
        with interruptible(progress):
            going_on.append(progress.step_complete("all", 0))
            signal.raise_signal(signal.SIGINT)
            going_on.append(progress.step_complete("all", 1))

    with pytest.raises(KeyboardInterrupt):
        work()
    assert going_on == [True, False]


def test_in_another_thread_nothing_is_changed() -> None:
    with ThreadPoolExecutor(1) as pool:
        pool.submit(lambda: list(_inside())).result()


def _inside() -> Iterator[None]:
    before = signal.getsignal(signal.SIGINT)
    with interruptible(BuildProgress()):
        assert signal.getsignal(signal.SIGINT) is before
        yield
