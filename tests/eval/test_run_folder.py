"""A run's folder goes on with what it was started with, and has one writer."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from excise.errors import ArtefactError, OutputError
from excise.eval.cases import Case
from excise.eval.run_folder import (
    LOCK,
    NAME,
    ProtocolEntry,
    RunConfiguration,
    RuntimeEntry,
    differences,
    open_run,
    read_configuration,
)

CASES = [Case("1", "a cat", 1, 7.5), Case("2", "a dog", 2, 7.5)]
SETTINGS: dict[str, Any] = {"steps": 50, "thresholds": [0.45, 0.6], "rules": ("RECE", "SPEED")}
SERVED = RuntimeEntry(source="onnx:here", edit="ab", manifest="cd")


def configured(cases: list[Case] = CASES, settings: dict[str, Any] = SETTINGS, **changes: Any) -> RunConfiguration:
    fields: dict[str, Any] = {
        "protocols": {"demo-weapons": ProtocolEntry.of(1, settings, cases)},
        "runtimes": {"served": SERVED},
        "batch_size": 4,
    }
    return RunConfiguration(**{**fields, **changes})


def tree(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_run_goes_on_with_what_it_was_started_with(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "run"
    with open_run(folder, configured()):
        assert (folder / LOCK).read_text() == f"{os.getpid()}\n"
        (folder / "images").write_text("an image")
    first = tree(folder)
    assert set(first) == {NAME, LOCK, "images"}
    assert first[LOCK] == b""
    with open_run(folder, configured()):
        pass
    assert tree(folder) == first
    assert read_configuration(folder).model_dump(mode="json") == configured().model_dump(mode="json")
    assert {"python", "excise", "numpy", "pillow"} <= set(read_configuration(folder).versions)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"settings": {"steps": 25, "thresholds": [0.45, 0.6], "rules": ["RECE", "SPEED"]}},
            "settings.steps is 50 there",
        ),
        ({"cases": CASES[:1]}, r"protocols.demo-weapons.cases is 2 there and 1 now; .*cases_sha256"),
        ({"cases": [CASES[0], Case("2", "a dog", 3, 7.5)]}, "cases_sha256 is"),
        ({"cases": CASES[::-1]}, "cases_sha256 is"),
        (
            {"runtimes": {"served": SERVED.model_copy(update={"source": "onnx:there"})}},
            "source is 'onnx:here'",
        ),
        (
            {"runtimes": {"served": SERVED.model_copy(update={"manifest": "ef"})}},
            "manifest is 'cd' there",
        ),
        ({"runtimes": {}}, "runtimes.served is .* there and absent now"),
        ({"batch_size": 8}, "batch_size is 4 there and 8 now"),
        ({"image_format": "webp"}, "image_format is 'png' there and 'webp' now"),
        ({"versions": {"numpy": "0.0"}}, "versions.python is .* there and absent now"),
    ],
)
def test_another_configuration_is_refused_by_what_differs(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with open_run(tmp_path, configured()):
        pass
    before = tree(tmp_path)
    with pytest.raises(OutputError, match=message), open_run(tmp_path, configured(**changes)):
        raise AssertionError("it was opened")
    assert tree(tmp_path) == before


def test_a_second_writer_is_refused_and_the_lock_of_a_killed_one_is_free(tmp_path: Path) -> None:
    code = """
import sys
from pathlib import Path
from excise.eval.run_folder import RunConfiguration, open_run
with open_run(Path(sys.argv[1]), RunConfiguration.model_validate_json(sys.argv[2])):
    print("held", flush=True)
    sys.stdin.read()
"""
    command = [sys.executable, "-c", code, str(tmp_path), configured().to_json()]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        before = tree(tmp_path)
        with (
            pytest.raises(OutputError, match=f"process {other.pid} is writing to .*: wait for it, or choose another"),
            open_run(tmp_path, configured()),
        ):
            raise AssertionError("it was opened")
        assert tree(tmp_path) == before
        other.send_signal(signal.SIGKILL)
    assert (tmp_path / LOCK).read_text() == f"{other.pid}\n"
    with open_run(tmp_path, configured()):
        pass
    assert (tmp_path / LOCK).read_text() == ""


def test_an_error_within_gives_the_lock_back(tmp_path: Path) -> None:
    with pytest.raises(ArtefactError), open_run(tmp_path, configured()):
        raise ArtefactError("a vanished endpoint")
    with open_run(tmp_path, configured()):
        assert (tmp_path / LOCK).read_text()


def test_what_is_no_run_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    (tmp_path / "file").write_text("")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / NAME).write_text('{"format": 2}')
    (tmp_path / "cut").mkdir()
    (tmp_path / "cut" / NAME).write_text(configured().to_json()[:100])
    for name, kind, message in (
        ("mine", OutputError, "holds thesis.txt but no run.json"),
        ("file", OutputError, "can't be made: File exists"),
        ("other", ArtefactError, "is no run of format 1: "),
        ("cut", ArtefactError, "is no run of format 1: "),
    ):
        with pytest.raises(kind, match=message), open_run(tmp_path / name, configured()):
            raise AssertionError("it was opened")
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years of work"
    with pytest.raises(ArtefactError, match="can't be read"):
        read_configuration(tmp_path)


def test_a_start_that_was_killed_before_it_wrote_anything_goes_on(tmp_path: Path) -> None:
    (tmp_path / LOCK).write_text("12345\n")
    (tmp_path / f".excise-partial-{NAME}").write_text("{")
    with open_run(tmp_path, configured()):
        pass
    assert set(tree(tmp_path)) == {NAME, LOCK}


def test_differences_name_the_place() -> None:
    there, here = {"a": {"b": [1, 2], "c": 1}, "d": None}, {"a": {"b": [1, 3], "c": 1}, "e": "x" * 100}
    assert differences(there, there) == []
    assert differences(there, here) == ["a.b is [1, 2] there and [1, 3] now", f"e is absent there and '{'x' * 58}… now"]
