"""A run ended anywhere and started again gives the same report to the last byte, or says why it can't go on."""

from __future__ import annotations

import base64
import dataclasses
import errno
import io
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from excise.errors import ArtefactError, OutputError, UsageError
from excise.eval.evaluate import Run, evaluate
from excise.eval.evaluation import read_evaluation
from excise.eval.protocol_choice import Choice
from excise.eval.protocol_comparisons import Roles
from excise.eval.protocol_file import load_protocol
from excise.eval.runtime_spec import parse_runtime
from excise.serve.runtime import Request
from tests.eval.evaluated_runs import (
    PROTOCOL,
    Clip,
    Painter,
    clip_models,
    no_pipeline,
    painters,
    start,
    tree,
    written_protocol,
)
from tests.eval.fake_endpoint import Answer, Asked, fake_endpoint

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(scope="module")
def protocol(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written_protocol(tmp_path_factory.mktemp("protocol"))


@pytest.fixture(scope="module")
def finished(protocol: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run's folder; tests copy it."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    with pytest.MonkeyPatch.context() as patch:
        start(folder, protocol, patch)
    return folder


@pytest.fixture
def folder(finished: Path, tmp_path: Path) -> Path:
    return shutil.copytree(finished, tmp_path / "run")


def report(folder: Path) -> bytes:
    return (folder / "report.json").read_bytes()


def test_images_go_to_every_runtime_with_the_protocols_settings(
    tmp_path: Path, protocol: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = painters()
    started = start(tmp_path, protocol, monkeypatch, made=made, num_inference_steps=2)
    assert [one.steps for one in made.values()] == [[2, 2, 2]] * 3
    assert started.evaluation.protocols[0].settings["sampling"]["num_inference_steps"] == 2
    assert read_evaluation(tmp_path) == started.evaluation
    timings = json.loads((tmp_path / "timings.json").read_text())
    assert {name: one["grey"]["images"] for name, one in timings.items()} == dict.fromkeys(made, 12)
    # The report can't tell when it was made.
    assert b"seconds" not in report(tmp_path).replace(b'"seconds_per_image": null', b"")


def test_a_finished_run_needs_neither_models_nor_networks(
    folder: Path, protocol: Path, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clip, made = Clip(), painters()
    started = start(folder, protocol, monkeypatch, models=clip_models(clip), made=made)
    assert clip.looked == 0
    assert [one.calls for one in made.values()] == [0, 0, 0]
    assert not [line for line in started.said if line.startswith("loading")]
    assert tree(folder) == tree(finished)


Damage = Callable[[Path], object]
DAMAGES: dict[str, tuple[Damage, int]] = {
    "an image gone": (lambda run: (run / "grey/images/served/cat-1.png").unlink(), 1),
    "an image cut": (lambda run: os.truncate(run / "grey/images/served/cat-1.png", 99), 1),
    "an image empty": (lambda run: os.truncate(run / "grey/images/base/Gun-0.png", 0), 1),
    "all that was seen gone": (lambda run: shutil.rmtree(run / "grey/seen"), 0),
    "what was seen cut": (lambda run: [os.truncate(one, 50) for one in (run / "grey/seen").rglob("0*")], 0),
    "report gone": (lambda run: (run / "report.json").unlink(), 0),
    "timings gone": (lambda run: (run / "timings.json").unlink(), 0),
    "a runtime gone": (lambda run: shutil.rmtree(run / "grey/images/edited"), 3),
    "left over": (lambda run: (run / "grey/images/served/.excise-partial-cat-1.png").write_bytes(b"half"), 0),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_is_damaged_is_made_again(
    folder: Path, protocol: Path, finished: Path, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    inflict, calls = DAMAGES[damage]
    inflict(folder)
    made = painters()
    started = start(folder, protocol, monkeypatch, made=made)
    assert sum(one.calls for one in made.values()) == calls
    assert report(folder) == report(finished)
    if damage in ("an image cut", "an image empty"):
        assert any("1 damaged images were made again" in line for line in started.said)


#: Forked for every point: ends itself with SIGKILL at the n-th file that it opens to write, renames or makes.
KILLED = """
import os, signal, sys
from pathlib import Path
import pytest
from tests.eval.evaluated_runs import clip_models, painters, start, tree
base, protocol, every = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
made = {name: one for name, one in painters().items() if name != "served"}
start(base / "whole", protocol, pytest.MonkeyPatch(), made=made)  # also: what is imported late is imported now

def child(folder, kill_at):
    pid = os.fork()
    if pid:
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    seen = 0
    def hook(event, arguments):
        nonlocal seen
        writing = event == "open" and (arguments[1] or "").strip("br") if event == "open" else event.startswith("os.")
        if writing and event != "os.listdir" and event != "os.scandir" and str(folder) in str(arguments[0]):
            if seen == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
            seen += 1
    sys.addaudithook(hook)
    start(folder, protocol, pytest.MonkeyPatch(), made={name: type(one)(name, one.lost) for name, one in made.items()})
    os._exit(0)

whole, point, phases = (base / "whole" / "report.json").read_bytes(), 0, set()
while True:
    folder = base / str(point)
    ended = child(folder, point)
    if ended == 0:
        break
    assert ended == -signal.SIGKILL, ended
    left = set(tree(folder)) if folder.exists() else set()
    seen = any("/seen/" in name for name in left)
    phases.add("figures" if "timings.json" in left and seen else "features" if "timings.json" in left else "images")
    assert "report.json" not in left or (folder / "report.json").read_bytes() == whole
    assert child(folder, None) == 0
    assert (folder / "report.json").read_bytes() == whole, point
    point += every
print(point, *sorted(phases))
"""


def test_killed_at_many_points_a_run_ends_in_the_same_report(tmp_path: Path, protocol: Path) -> None:
    small = written_protocol(tmp_path / "small", seeds=1)
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path), str(small), "3"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    point, *phases = done.stdout.split()
    # 8 images, 2 blocks, run.json, timings and report: an opening and a renaming each.
    assert int(point) >= 26
    assert phases == ["features", "figures", "images"]


@pytest.mark.parametrize("limit", [1, 2, 7, 8])
def test_few_images_are_a_report_too(
    tmp_path: Path, protocol: Path, monkeypatch: pytest.MonkeyPatch, limit: int
) -> None:
    """Seven cases have one kept image, eight two: what so few can't tell, the figures say."""
    started = start(tmp_path / "run", protocol, monkeypatch, limit=limit)
    (record,) = started.evaluation.protocols
    owners = [one.measures for one in (*record.runtimes, *record.comparisons)]
    for figures in (*owners, record.power):
        for name, measure in figures.items():
            assert (measure.value is None) == bool(measure.error), name
    assert len(record.cases) == limit


@pytest.mark.parametrize("stop_at", [0, 1, 2])
def test_a_vanished_runtime_loses_nothing(
    tmp_path: Path, protocol: Path, finished: Path, monkeypatch: pytest.MonkeyPatch, stop_at: int
) -> None:
    broken = painters()
    broken["served"].stop_at = stop_at
    with pytest.raises(ArtefactError, match="served has vanished"):
        start(tmp_path / "run", protocol, monkeypatch, made=broken)
    assert not (tmp_path / "run" / "report.json").exists()
    made = painters()
    start(tmp_path / "run", protocol, monkeypatch, made=made)
    assert [one.calls for one in made.values()] == [0, 0, 3 - stop_at]
    assert report(tmp_path / "run") == report(finished)


@pytest.mark.parametrize("room", [5, 36, 38, 40])
def test_a_full_disk_is_one_error_and_the_run_goes_on(
    tmp_path: Path, protocol: Path, finished: Path, monkeypatch: pytest.MonkeyPatch, room: int
) -> None:
    """After 36 images, ``run.json`` counted apart, come timings, three blocks of features and the report."""
    left, replace = [room + 1], os.replace

    def until_full(source: Path, target: Path) -> None:
        if not left[0]:
            raise OSError(errno.ENOSPC, "No space left on device")
        left[0] -= 1
        replace(source, target)

    with monkeypatch.context() as full:
        full.setattr(os, "replace", until_full)
        with pytest.raises(OutputError, match=r"can't be written: (n|N)o space (is )?left on (the disk|device)"):
            start(tmp_path / "run", protocol, full)
    start(tmp_path / "run", protocol, monkeypatch)
    assert report(tmp_path / "run") == report(finished)


CHANGES: dict[str, tuple[dict[str, Any], str]] = {
    "steps": ({"num_inference_steps": 3}, r"num_inference_steps is 4 there and 3 now"),
    "limit": ({"limit": 5}, r"protocols\.grey\.settings\.chosen\.limit is absent there and 5 now"),
    "sample": ({"sample": 6, "sample_seed": 1}, r"chosen\.sample is absent there and 6 now"),
    "scheduler": ({"own_scheduler": True}, r"sampling\.scheduler is absent there and \"each model's own\" now"),
    "batch": ({"batch_size": 2}, "batch_size is 4 there and 2 now"),
    "runtimes": (
        {"made": {"base": Painter("base"), "edited": Painter("edited")}},
        r"runtimes\.served is .* and absent",
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_another_configuration_is_refused_with_what_differs(
    folder: Path, protocol: Path, finished: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    options, message = CHANGES[change]
    with pytest.raises(OutputError, match=message):
        start(folder, protocol, monkeypatch, **options)
    assert tree(folder) == tree(finished)


def test_another_protocol_of_that_name_is_refused(
    folder: Path, tmp_path: Path, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = written_protocol(tmp_path / "rule", PROTOCOL.replace("top: 2", "top: 3"))
    with pytest.raises(OutputError, match=r"grey\.settings\.rules is .* there and"):
        start(folder, other, monkeypatch)
    prompts = written_protocol(tmp_path / "prompts", seeds=2)
    with pytest.raises(OutputError, match=r"grey\.cases is 12 there and 8 now"):
        start(folder, prompts, monkeypatch)
    assert tree(folder) == tree(finished)


def test_other_roles_are_another_report_of_the_same_images(
    folder: Path, protocol: Path, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = painters()
    start(folder, protocol, monkeypatch, made=made, roles=Roles(reference="base"))
    assert sum(one.calls for one in made.values()) == 0
    assert read_evaluation(folder).protocols[0].reference == "base"
    start(folder, protocol, monkeypatch)
    assert report(folder) == report(finished)


@pytest.mark.parametrize(
    ("roles", "message"),
    [
        (Roles(base="bse"), "--base bse: the runtimes are base, edited, served"),
        (Roles(reference="x"), "--reference x: the runtimes are"),
        (Roles(base="base", reference="base"), "--base base: the unedited model can't be the edited one as well"),
        (Roles(base="base", reference="edited", floor=("x",)), "--floor x: the runtimes are"),
        (Roles(base="base", reference="edited", floor=("base",)), "the unedited model can't be the edited one"),
        (Roles(base="base", reference="edited", floor=("edited",)), "--floor edited: it is the reference itself"),
        (Roles(base="base", reference="edited", floor=("served",) * 2), "--floor served is given twice"),
        (Roles(floor=("served",)), "--floor needs --reference"),
    ],
)
def test_roles_that_cannot_be(
    tmp_path: Path, protocol: Path, monkeypatch: pytest.MonkeyPatch, roles: Roles, message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        start(tmp_path / "run", protocol, monkeypatch, roles=roles)
    assert not (tmp_path / "run").exists()


def test_a_protocol_twice_or_nothing_to_run(tmp_path: Path, protocol: Path) -> None:
    run = Run(tmp_path / "run", [parse_runtime("s=openai:http://localhost:1")], Roles(), clip_models(), no_pipeline)
    choice = Choice(load_protocol(protocol))
    with pytest.raises(UsageError, match="protocol grey is named twice"):
        evaluate([choice, choice], run)
    with pytest.raises(UsageError, match="there is nothing to run: 0 protocols on 1 runtimes"):
        evaluate([], run)
    with pytest.raises(UsageError, match="1 protocols on 0 runtimes"):
        evaluate([choice], dataclasses.replace(run, specs=[]))
    assert not (tmp_path / "run").exists()


def test_images_of_another_size_than_the_protocols_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = PROTOCOL.replace("guidance_scale: 2", "guidance_scale: 2, width: 16, height: 8")
    started = start(tmp_path / "run", written_protocol(tmp_path, text), monkeypatch)
    assert "grey is of images of 16 x 8 pixels, and those of served have 8 x 8" in started.said
    assert started.evaluation.protocols[0].settings["image_sizes"]["served"] == "8 x 8"
    big = painters() | {"served": Painter("served", size=9)}
    with pytest.raises(UsageError, match=r"served makes images of 9 x 9 pixels, .* runtimes are compared at one size"):
        start(tmp_path / "big", written_protocol(tmp_path), monkeypatch, made=big)


def test_memory_holds_one_block_of_images_whatever_the_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Images are read by the block, and let go of."""
    from excise.eval import observation_cache

    alive, most, read = [0], [0], observation_cache.read_image

    class Counted(np.ndarray):  # type: ignore[type-arg]
        def __del__(self) -> None:
            if getattr(self, "counted", False):
                alive[0] -= 1

    def counting(path: Path) -> np.ndarray:  # type: ignore[type-arg]
        image = np.array(read(path)).view(Counted)
        image.counted = True  # type: ignore[attr-defined]
        alive[0] += 1
        most[0] = max(most[0], alive[0])
        return image

    monkeypatch.setattr(observation_cache, "BLOCK", 10)
    monkeypatch.setattr(observation_cache, "read_image", counting)
    start(tmp_path / "run", written_protocol(tmp_path, seeds=20), monkeypatch)
    # Of 80 images of each of three runtimes.
    assert most[0] <= 12
    assert alive[0] <= 3


# --- Endpoints --------------------------------------------------------------------------------------------------------


def answered(asked: Asked) -> Answer:
    painted = painters()["served"].generate([Request(asked.body["prompt"], seed=asked.body["seed"])])[0]
    return Answer(_image(painted))


def _image(pixels: np.ndarray) -> dict[str, Any]:  # type: ignore[type-arg]
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "png")
    return {"data": [{"b64_json": base64.b64encode(buffer.getvalue()).decode()}]}


def slow(asked: Asked) -> Answer:
    import time

    time.sleep(0.6)
    return answered(asked)


FAILURES: dict[str, tuple[Callable[[Asked], Answer], str]] = {
    "500": (lambda _: Answer(b"out of memory", status=500), "500"),
    "HTML": (lambda _: Answer(b"<html>login</html>", headers={"content-type": "text/html"}), "JSON|json|html|HTML"),
    "no image": (lambda _: Answer({"data": [{"url": "http://elsewhere"}]}), "an image's address"),
    "time-out": (slow, "0.3 s|timed out|in time|seconds"),
    "another size": (lambda _: Answer(_image(np.zeros((6, 8, 3), np.uint8))), "8 × 6 (pixels)?"),
}


@pytest.mark.parametrize("failure", FAILURES)
def test_an_endpoint_that_fails_loses_nothing(
    tmp_path: Path, protocol: Path, monkeypatch: pytest.MonkeyPatch, failure: str
) -> None:
    """It answers five requests, then fails; started again, it is asked for what is missing."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    fails, message = FAILURES[failure]
    count, broken = [0], [True]

    def answer(asked: Asked) -> Answer:
        if asked.method == "GET":  # what it serves, which it needn't tell
            return Answer(b"", status=404)
        count[0] += 1
        return fails(asked) if broken[0] and count[0] > 5 else answered(asked)

    with fake_endpoint(answer) as server:
        spec = parse_runtime(f"served=openai:{server.url}?retries=0&timeout=0.3")
        run = Run(tmp_path, [spec], Roles(), clip_models(), no_pipeline, batch_size=2, progress=False)
        choices = [Choice(load_protocol(protocol))]
        with pytest.raises((ArtefactError, UsageError), match=message) as caught:
            evaluate(choices, run)
        assert "\n" not in str(caught.value)
        assert len(list(tmp_path.rglob("*.png"))) == 4
        broken[0], count[0] = False, 0
        (record,) = evaluate(choices, run).protocols
        assert count[0] == 8
    rate = record.runtimes[0].measures["detected.top1"]
    assert (rate.value, rate.n) == (0, 6)
