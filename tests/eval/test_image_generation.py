"""Ended anywhere and started again, a run ends in the same files; what it can't go on with is one clear error."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from excise.errors import ArtefactError, OutputError, UsageError
from excise.eval.cases import Case
from excise.eval.image_file import read_entries, read_image
from excise.eval.image_generation import GenerationSettings, cases_digest, generate, shards
from excise.serve.runtime import Progress, Request

ROOT = Path(__file__).parent.parent.parent
CASES = [
    Case(f"{number}", f"a cat, {number}", seed=number, guidance_scale=(7.5, 3.0)[number % 5 == 1])
    for number in range(13)
]
SETTINGS = GenerationSettings(num_inference_steps=2, edit_id="ed", depends_on={"source": "onnx:here"})


class Painter:
    """Images that depend on the whole batch, as a float's last bits do, and may stop in any call."""

    def __init__(self, stop_at: int | None = None, size: int = 8) -> None:
        self.name, self.stop_at, self.size = "painter", stop_at, size
        self.batches: list[list[int]] = []

    def generate(
        self,
        requests: Sequence[Request],
        *,
        num_inference_steps: int = 50,
        guidance_scale: float = 7.5,
        progress: Progress | None = None,
    ) -> npt.NDArray[np.uint8]:
        if len(self.batches) == self.stop_at:
            raise ArtefactError("the endpoint has vanished")
        self.batches.append([request.seed for request in requests])
        key = [*self.batches[-1], num_inference_steps, int(guidance_scale * 10)]
        if progress is not None:
            for step in range(num_inference_steps):
                progress(step + 1, num_inference_steps)
        rng = np.random.default_rng(key)
        return rng.integers(0, 256, (len(requests), self.size, self.size, 3), np.uint8)


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def run(folder: Path, painter: Painter | None = None, cases: Sequence[Case] = CASES, **options: object) -> Painter:
    painter = painter or Painter()
    settings = dataclasses.replace(SETTINGS, **options)  # type: ignore[arg-type]
    generate(folder, "served", cases, painter, settings, batch_size=3, progress=False)
    return painter


@pytest.fixture
def whole(tmp_path: Path) -> dict[str, bytes]:
    run(tmp_path / "whole")
    return tree(tmp_path / "whole")


def test_shards_are_a_function_of_the_cases() -> None:
    planned = shards(CASES, 3)
    assert [[case.id for case in shard] for shard in planned] == [
        ["0", "2", "3"],
        ["4", "5", "7"],
        ["8", "9", "10"],
        ["12"],
        ["1", "6", "11"],
    ]
    for cases, size, message in (
        ([], 3, "no case"),
        (CASES, 0, "batch_size must be at least 1, not 0"),
        ([CASES[0], CASES[0]], 3, "two cases are called 0"),
    ):
        with pytest.raises(UsageError, match=message):
            shards(cases, size)


def test_shards_have_one_size_each() -> None:
    sides = [None, 16, 16, None, 24]
    cases = [dataclasses.replace(CASES[n], guidance_scale=7.5, height=s, width=s) for n, s in enumerate(sides)]
    assert [[case.id for case in shard] for shard in shards(cases, 3)] == [["0", "3"], ["1", "2"], ["4"]]
    assert [[case.id for case in shard] for shard in shards(cases, 1)] == [["0"], ["3"], ["1"], ["2"], ["4"]]


def test_a_size_changes_a_list_of_cases_and_none_leaves_it_as_it_was() -> None:
    """Folders of runs from before cases had sizes go on."""
    before = "3a8e8701d9dceb5523622437cd89c2b8671c9f8d58694375754f09a93f59bdf6"
    cases = [Case("1", "a cat", 1, 7.5), Case("2", "a dog", 2, 7.5)]
    assert cases_digest(cases) == before
    sized = [dataclasses.replace(cases[0], height=16, width=8), cases[1]]
    turned = [dataclasses.replace(cases[0], height=8, width=16), cases[1]]
    assert len({before, cases_digest(sized), cases_digest(turned)}) == 3


def test_every_image_is_its_cases_with_what_made_it(tmp_path: Path) -> None:
    done = generate(tmp_path, "served", CASES, Painter(), SETTINGS, batch_size=3, progress=False)
    assert list(done.files) == [case.id for case in CASES]
    assert (done.made, done.computed, done.damaged) == (13, 13, ())
    assert done.seconds_per_image is not None
    alone = Painter().generate([Request("", seed=seed) for seed in (1, 6, 11)], num_inference_steps=2, guidance_scale=3)
    assert np.array_equal(read_image(done.files["6"]), alone[1])
    entries = read_entries(done.files["6"])
    settings = entries.pop("excise.settings")
    assert len(settings) == 64
    assert entries == {
        "excise.case": "6",
        "excise.prompt": "a cat, 6",
        "excise.negative_prompt": "",
        "excise.seed": "6",
        "excise.guidance_scale": "3.0",
        "excise.num_inference_steps": "2",
        "excise.runtime": "served",
        "excise.edit_id": "ed",
    }
    again = generate(tmp_path, "served", CASES, Painter(stop_at=0), SETTINGS, batch_size=3, progress=False)
    assert (again.made, again.computed, again.seconds_per_image) == (0, 0, None)
    assert again.files == done.files


@pytest.mark.parametrize("image_format", ["png", "webp"])
def test_an_incomplete_shard_is_computed_as_a_whole_again(tmp_path: Path, image_format: str) -> None:
    run(tmp_path / "whole", image_format=image_format)
    run(tmp_path / "again", image_format=image_format)
    for id in ("5", "12"):
        (tmp_path / "again" / "images" / "served" / f"{id}.{image_format}").unlink()
    kept = tmp_path / "again" / "images" / "served" / f"4.{image_format}"
    before = kept.stat().st_mtime_ns
    painter = run(tmp_path / "again", image_format=image_format)
    assert painter.batches == [[4, 5, 7], [12]]
    assert kept.stat().st_mtime_ns == before
    assert tree(tmp_path / "again") == tree(tmp_path / "whole")


@pytest.mark.parametrize("stop_at", range(5))
def test_a_vanished_runtime_leaves_what_is_done_and_goes_on(
    tmp_path: Path, whole: dict[str, bytes], stop_at: int
) -> None:
    with pytest.raises(ArtefactError, match="the endpoint has vanished"):
        run(tmp_path / "stopped", Painter(stop_at))
    left = tree(tmp_path / "stopped")
    assert len(left) == min(3 * stop_at, 10)
    assert left.items() <= whole.items()
    assert len(run(tmp_path / "stopped").batches) == 5 - stop_at
    assert tree(tmp_path / "stopped") == whole


def test_a_full_disk_leaves_what_is_done_and_goes_on(
    tmp_path: Path, whole: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    room, replace = iter(range(7)), os.replace

    def until_full(source: Path, target: Path) -> None:
        if next(room, None) is None:
            raise OSError(28, "No space left on device")
        replace(source, target)

    monkeypatch.setattr(os, "replace", until_full)
    with pytest.raises(OutputError, match=r"9\.png can't be written: no space is left on the disk; what is done stays"):
        run(tmp_path / "full")
    monkeypatch.undo()
    assert len(tree(tmp_path / "full")) == 7
    assert tree(tmp_path / "full").items() <= whole.items()
    assert run(tmp_path / "full").batches == [[8, 9, 10], [12], [1, 6, 11]]
    assert tree(tmp_path / "full") == whole


def test_damaged_images_are_made_again(tmp_path: Path, whole: dict[str, bytes]) -> None:
    run(tmp_path / "damaged")
    images = tmp_path / "damaged" / "images" / "served"
    data = (images / "3.png").read_bytes()
    (images / "3.png").write_bytes(data[: len(data) // 2])
    (images / "6.png").write_bytes(b"")
    (images / "12.png").write_bytes(b"<html>not found</html>")
    done = generate(tmp_path / "damaged", "served", CASES, Painter(), SETTINGS, batch_size=3, progress=False)
    assert (done.damaged, done.made, done.computed) == (("3", "6", "12"), 3, 7)
    assert tree(tmp_path / "damaged") == whole


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_inference_steps": 3}, "made with num_inference_steps '2', and this run has '3'"),
        ({"edit_id": None}, "made with edit_id 'ed', and this run has ''"),
        ({"depends_on": {"source": "onnx:there"}}, "made with settings"),
        ({"cases": CASES[:12]}, "made with settings"),
        ({"cases": [dataclasses.replace(CASES[0], prompt="a dog"), *CASES[1:]]}, "made with prompt 'a cat, 0', and"),
        ({"cases": [dataclasses.replace(CASES[0], seed=99), *CASES[1:]]}, "made with seed '0', and this run has '99'"),
    ],
)
def test_images_of_another_configuration_are_never_replaced(
    tmp_path: Path, whole: dict[str, bytes], change: dict[str, object], message: str
) -> None:
    with pytest.raises(OutputError, match=message):
        run(tmp_path / "whole", Painter(stop_at=0), **change)  # type: ignore[arg-type]
    assert tree(tmp_path / "whole") == whole


def test_images_of_another_size_or_kind_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ArtefactError, match="the endpoint"):
        run(tmp_path, Painter(stop_at=2))
    with pytest.raises(ArtefactError, match="served made images of 9 × 9 pixels, and those before have 8 × 8"):
        run(tmp_path, Painter(size=9))

    class Short(Painter):
        def generate(self, requests: Sequence[Request], **options: object) -> npt.NDArray[np.uint8]:
            return super().generate(requests[1:])

    with pytest.raises(ArtefactError, match=r"returned uint8 with shape \(2, 8, 8, 3\) for 3 requests"):
        run(tmp_path / "short", Short())
    with pytest.raises(UsageError, match="can't name a runtime's folder"):
        generate(tmp_path, "a/b", CASES, Painter(), SETTINGS, batch_size=3)
    with pytest.raises(UsageError, match="num_inference_steps must be at least 1"):
        GenerationSettings(0)


def test_progress_counts_whole_images_to_the_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ArtefactError):
        run(tmp_path, Painter(stop_at=1))
    generate(tmp_path, "served", CASES, Painter(), SETTINGS, batch_size=3)
    out, err = capsys.readouterr()
    assert out == ""
    last = err.rstrip().rpartition("\r")[2]
    assert "served: 100%" in last
    assert "13/13" in last
    assert "image" in last


#: Forked for every point: ends itself with SIGKILL at the n-th time that a file is opened, renamed or removed, then a
#: second child goes on in the folder. A signal that comes between two of these points changes no file.
KILLED = """
import os, signal, sys
from pathlib import Path
from tests.eval.test_image_generation import run, tree
base = Path(sys.argv[1])

def child(folder, kill_at):
    pid = os.fork()
    if pid:
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    seen = 0
    def hook(event, arguments):
        nonlocal seen
        if event in ("open", "os.rename", "os.remove", "os.mkdir") and str(folder) in str(arguments[0]):
            if seen == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
            seen += 1
    sys.addaudithook(hook)
    run(folder)
    os._exit(0)

assert child(base / "whole", None) == 0
whole, point, states = tree(base / "whole"), 0, set()
while True:
    folder = base / str(point)
    ended = child(folder, point)
    if ended == 0:
        break
    assert ended == -signal.SIGKILL, ended
    left = tree(folder) if folder.exists() else {}
    states.add(tuple(sorted(left)))
    partial = {name for name in left if ".excise-partial-" in name}
    assert len(partial) <= 1
    assert {name: left[name] for name in left.keys() - partial}.items() <= whole.items()
    assert child(folder, None) == 0
    assert tree(folder) == whole, point
    point += 1
print(point, len(states))
"""


def test_killed_at_every_point_a_run_ends_in_the_same_files(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path)], cwd=ROOT, check=True, capture_output=True, text=True
    )
    points, states = map(int, done.stdout.split())
    assert points >= 2 * len(CASES)
    assert states >= 2 * len(CASES)


EXPORTED = """
import sys
from pathlib import Path
from tests.eval.test_image_generation import run_export
run_export(Path(sys.argv[1]), Path(sys.argv[2]))
"""


def run_export(folder: Path, exported: Path) -> None:
    from excise.eval.runtimes import open_runtime, parse_runtime

    cases = [Case(f"{number}", f"a gun {number}", number, 2.0 if number > 3 else 5.0) for number in range(6)]
    runtime = open_runtime(parse_runtime(f"served=onnx:{exported}?threads=1"), no_pipeline)
    generate(folder, "served", cases, runtime, GenerationSettings(8), batch_size=2, progress=False)


def no_pipeline(*_: object) -> None:
    raise AssertionError("an export needs no PyTorch")


def test_an_export_is_killed_and_goes_on(tmp_path: Path, tiny_model: Path) -> None:
    from excise.export.onnx_export import export_pipeline

    exported, folder, kills = tmp_path / "onnx", tmp_path / "killed", 0
    export_pipeline(tiny_model, exported)
    run_export(tmp_path / "whole", exported)
    whole = tree(tmp_path / "whole")
    assert len(set(whole.values())) == 6
    for images in (1, 3):
        command = [sys.executable, "-c", EXPORTED, str(folder), str(exported)]
        with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL) as process:
            while process.poll() is None and len(list(folder.rglob("[0-9]*.png"))) < images:
                time.sleep(0.02)
            process.send_signal(signal.SIGKILL)
        kills += process.returncode == -signal.SIGKILL
        assert tree(folder).items() <= whole.items() or list(folder.rglob(".excise-partial-*"))
    assert kills
    run_export(folder, exported)
    assert tree(folder) == whole
