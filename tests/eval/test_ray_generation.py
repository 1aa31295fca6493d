"""On a local Ray: the serial run's files byte for byte, whole errors, and what is done stays."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from excise.errors import ArtefactError, MissingExtra, ModelError, UsageError
from excise.eval.cases import Case
from excise.eval.image_generation import GenerationSettings, generate
from excise.eval.ray_generation import generate_on_ray
from excise.eval.runtime_spec import parse_runtime
from excise.eval.runtimes import open_runtime
from excise.export.onnx_export import export_pipeline
from excise.export.pipeline import load_pipeline

CASES = [Case(f"{number}", f"a gun {number}", number, 2.0 if number > 6 else 5.0) for number in range(9)]
SETTINGS = GenerationSettings(num_inference_steps=2)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """A Ray of this test's own, with two actors' room."""
    ray = pytest.importorskip("ray", reason="Ray isn't installed: pip install 'excise[ray]'")
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    root = str(Path(__file__).parent.parent.parent)
    ray.init(
        address="local",
        num_cpus=2,
        num_gpus=0,
        include_dashboard=False,
        log_to_driver=False,
        logging_level="ERROR",
        runtime_env={"env_vars": {"PYTHONPATH": root}},
    )
    yield ray
    ray.shutdown()


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("kind", ["onnx", pytest.param("torch", marks=pytest.mark.slow)])
def test_two_actors_make_the_serial_runs_files(cluster: Any, tmp_path: Path, tiny_model: Path, kind: str) -> None:
    folder = tiny_model
    if kind == "onnx":
        folder = tmp_path / "onnx"
        export_pipeline(tiny_model, folder)
    spec = parse_runtime(f"served={kind}:{folder}")
    serial, spread = tmp_path / "serial", tmp_path / "spread"
    runtime = open_runtime(spec, load_pipeline)
    generate(serial, "served", CASES, runtime, SETTINGS, batch_size=2, progress=False)
    done = generate_on_ray(spread, spec, CASES, load_pipeline, SETTINGS, batch_size=2, actors=2, progress=False)
    assert (done.made, done.computed, list(done.files)) == (9, 9, [case.id for case in CASES])
    assert len(set(tree(serial).values())) == 9
    assert tree(spread) == tree(serial)
    if kind == "torch":
        # Each actor imports PyTorch and diffusers anew, by far the longest part. On busy processors this test outlived
        # a time limit around it, and Ray makes of SIGTERM a SystemExit, which looks like a failure of the test's own.
        # What follows depends on the plan of shards alone.
        return
    # what one run began another goes on with
    (spread / "images" / "served" / "3.png").unlink()
    again = generate_on_ray(spread, spec, CASES, load_pipeline, SETTINGS, batch_size=2, progress=False)
    assert (again.made, again.computed) == (1, 2)
    assert tree(spread) == tree(serial)


@pytest.mark.slow
def test_errors_of_an_actor_are_one_line_and_what_is_done_stays(cluster: Any, tmp_path: Path, tiny_model: Path) -> None:
    (tmp_path / "empty").mkdir()
    spec = parse_runtime(f"served=torch:{tmp_path / 'empty'}")
    with pytest.raises(ModelError, match=r"is not a diffusers folder: it has no model_index\.json$") as caught:
        generate_on_ray(tmp_path, spec, CASES, load_pipeline, SETTINGS, batch_size=2, progress=False)
    assert type(caught.value) is ModelError
    assert "\n" not in str(caught.value)

    long = Case("long", "gun " * 99, 1, 9.0)
    spec = parse_runtime(f"served=torch:{tiny_model}")
    with pytest.raises(UsageError, match="a prompt of 101 tokens"):
        generate_on_ray(tmp_path, spec, [*CASES, long], load_pipeline, SETTINGS, batch_size=2, actors=1, progress=False)
    assert len(tree(tmp_path)) == len(CASES)
    assert not any("partial" in name for name in tree(tmp_path))


def die(folder: Path, edit: object) -> None:
    os._exit(1)


@pytest.mark.slow
def test_a_lost_actor_is_one_clear_error(cluster: Any, tmp_path: Path, tiny_model: Path) -> None:
    spec = parse_runtime(f"served=torch:{tiny_model}")
    with pytest.raises(ArtefactError, match="served: an actor of the Ray cluster was lost; what is done stays"):
        generate_on_ray(tmp_path, spec, CASES, die, SETTINGS, batch_size=2, progress=False)


def test_a_gpu_that_is_not_there_is_told(cluster: Any, tmp_path: Path, tiny_model: Path) -> None:
    spec = parse_runtime(f"served=torch:{tiny_model}?device=cuda")
    with pytest.raises(UsageError, match="the Ray cluster has no GPU"):
        generate_on_ray(tmp_path, spec, CASES, load_pipeline, SETTINGS, batch_size=2, progress=False)


def test_without_ray_the_extra_is_named(tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    spec = parse_runtime(f"served=torch:{tiny_model}")
    with pytest.raises(MissingExtra, match=r"pip install 'excise\[ray\]'"):
        generate_on_ray(tmp_path, spec, CASES, load_pipeline, SETTINGS, batch_size=2, progress=False)
