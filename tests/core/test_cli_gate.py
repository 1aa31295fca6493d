"""``excise gate``: exit statuses, JSON and JUnit, the plan, and one clear line for errors."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from excise.cli import cli, main
from excise.cli_gate import gate
from tests.eval.reports import count, evaluation

POLICY = """\
format: 1
name: release
rules:
  - kind: measure
    name: parts
    protocol: i2p-nudity
    measure: nude_parts.RECE
    bound: {upper: {times: 2}}
  - {kind: provenance, name: whole, protocol: i2p-nudity}
"""


@pytest.fixture(autouse=True)
def _registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(cli.commands, "gate", gate)


@pytest.fixture
def policy(tmp_path: Path) -> str:
    path = tmp_path / "policy.yaml"
    path.write_text(POLICY)
    return str(path)


def written(folder: Path, high: float, **provenance: Any) -> Path:
    report = evaluation(
        served={"nude_parts.RECE": count(high - 18, high - 33, high)},
        reference={"nude_parts.RECE": count(66, 51, 84)},
        **provenance,
    )
    folder.mkdir(exist_ok=True)
    (folder / "report.json").write_text(report.model_dump_json())
    return folder


def test_a_right_runtime_is_status_0(tmp_path: Path, policy: str, capsys: pytest.CaptureFixture[str]) -> None:
    folder = written(tmp_path / "run", 84)
    assert main(["gate", str(folder), "--policy", policy]) == 0
    out = capsys.readouterr().out
    assert out.splitlines()[-1] == "passed: policy release, 2 passed"
    assert main(["gate", str(folder / "report.json"), "--policy", policy, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["passed"]
    assert [check["status"] for check in document["checks"]] == ["passed", "passed"]


def test_a_wrong_one_is_status_1_and_names_images(
    tmp_path: Path, policy: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, junit = written(tmp_path / "run", 300, intact=False), tmp_path / "gate.xml"
    assert main(["gate", str(folder), "--policy", policy, "--junit", str(junit)]) == 1
    captured = capsys.readouterr()
    lines = captured.out.splitlines()
    assert lines[0].startswith("FAILED   i2p-nudity, onnx: parts: nude_parts.RECE is 282 [267, 300] over 142 images")
    assert lines[1].strip().startswith("images/onnx/b.png: ")
    assert lines[-1] == "failed: policy release, 2 failed"
    assert f"wrote {junit}" in captured.err
    root = ElementTree.parse(junit).getroot()
    assert root is not None
    assert root.get("failures") == "2"
    # A second run doesn't replace what the first wrote.
    assert main(["gate", str(folder), "--policy", policy, "--junit", str(junit)]) == 2
    assert "exists already" in capsys.readouterr().err


def test_nothing_judged_is_status_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "policy.yaml").write_text(
        "format: 1\nname: p\nrules: [{kind: provenance, name: n, protocol: coco-30k, if_not_run: skip}]\n"
    )
    assert main(["gate", str(written(tmp_path / "run", 84)), "--policy", str(tmp_path / "policy.yaml")]) == 1
    assert capsys.readouterr().out.splitlines()[-1] == "failed: nothing was judged: policy p, 1 skipped"


def test_the_bundled_policy_is_the_default(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["gate", str(written(tmp_path / "run", 84)), "--json"]) == 1
    document = json.loads(capsys.readouterr().out)
    assert document["policy"] == "default"
    # The hand-made report has no figures but the parts: the strict policy says which are missing.
    assert any("Nothing to judge: " in check["sentence"] for check in document["checks"])


def test_bad_input_is_one_line_and_status_2(tmp_path: Path, policy: str, capsys: pytest.CaptureFixture[str]) -> None:
    folder = written(tmp_path / "run", 84)
    other = tmp_path / "other.json"
    document = json.loads((folder / "report.json").read_text())
    other.write_text(json.dumps({**document, "format": 2}))
    (tmp_path / "text.json").write_text("no report")
    (tmp_path / "metric.yaml").write_text(POLICY.replace("nude_parts", "nude_prats"))
    (tmp_path / "field.yaml").write_text(POLICY.replace("times", "tims"))
    cases = {
        (): "name a report",
        (str(tmp_path / "none"), "--policy", policy): "can't be read",
        (str(other), "--policy", policy): "no evaluation of format 1: format: Input should be 1",
        (str(tmp_path / "text.json"), "--policy", policy): "no evaluation of format 1",
        (str(folder), "--policy", str(tmp_path / "metric.yaml")): "did you mean nude_parts?",
        (str(folder), "--policy", str(tmp_path / "field.yaml")): "tims: unknown field: did you mean times?",
        (str(folder), "--policy", "nobody"): "one of default, demo",
        (str(folder), "--power", "0.9"): "--power belongs to --plan",
        ("--plan",): "--plan needs --base-rate",
        ("--plan", str(folder), "--base-rate", "0.1", "--increase", "0.1"): "--plan needs no report",
        ("--plan", "--base-rate", "0.1", "--increase", "0.95"): "can't be: give more than 0, up to 0.9",
        ("--plan", "--base-rate", "0.1", "--increase", "0.1", "--max-times", "3"): "is never caught",
        ("--plan", "--base-rate", "0.1", "--increase", "0.1", "--max-times", "3", "--max-rate", "1"): "two rules",
        ("--plan", "--base-rate", "0.1", "--increase", "0.1", "--max-increase", "0"): "above 0",
        ("--plan", "--base-rate", "0.1", "--increase", "0.1", "--images", "0"): "needs cases",
    }
    for arguments, problem in cases.items():
        assert main(["gate", *arguments]) == 2, arguments
        captured = capsys.readouterr()
        assert captured.out == ""
        assert captured.err.count("\n") == 1, captured.err
        assert problem in captured.err


def test_a_plan_says_how_many_images(capsys: pytest.CaptureFixture[str]) -> None:
    goal = ["gate", "--plan", "--base-rate", "0.05", "--increase", "0.05"]
    assert main([*goal, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    # z² (1 − b) / b with b = 0.025, rounded up.
    assert (document["images"], document["false_alarm"]) == (150, 0.0)
    assert document["power"] >= 0.95
    assert main(goal) == 0
    assert "150 images are needed: upper 95 % end of the paired increase at most 0.025" in capsys.readouterr().out
    assert main([*goal, "--flips-p", "0.001", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["images"] > 150


def test_a_plan_tells_what_a_number_of_images_does(capsys: pytest.CaptureFixture[str]) -> None:
    goal = ["gate", "--plan", "--base-rate", "0.05", "--increase", "0.05", "--images"]
    assert main([*goal, "149", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["false_alarm"] == pytest.approx(1.0)
    assert main([*goal, "149"]) == 0
    assert "none (the rule rejects a right runtime too" in capsys.readouterr().out


def test_no_torch_is_imported(tmp_path: Path, policy: str) -> None:
    folder = written(tmp_path / "run", 84)
    code = (
        "import sys; from excise.cli import cli, main; from excise.cli_gate import gate; cli.add_command(gate); "
        f"status = main(['gate', {str(folder)!r}, '--policy', {policy!r}]); "
        "sys.exit(status or bool({'torch', 'matplotlib', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
