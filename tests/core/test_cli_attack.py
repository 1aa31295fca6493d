"""``excise attack`` as a user types it: on the bundled model, resumed, replayed, and given nonsense."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import click
import pytest
from pydantic import BaseModel

from excise.cli import main
from excise.cli_attack import attack
from excise.edit.erase import erase
from excise.edit.recipe import resolve
from excise.editfile import save_edit

#: One image of each weapon, in few steps.
FEW = ("--protocol", "demo-weapons", "--steps", "8")


@pytest.fixture(scope="module")
def edit(demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("edit") / "e.safetensors"
    save_edit(path, erase(demo_model, resolve("weapons", None, {})))
    return path


def failure(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line of an error; nothing on stdout, and no traceback."""
    capsys.readouterr()
    assert main(["attack", *arguments]) == 2, arguments
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "Traceback" not in captured.err
    errors = [line for line in captured.err.splitlines() if "rror" in line]
    assert len(errors) == 1, captured.err
    return errors[0]


@pytest.fixture(scope="module")
def attacked(edit: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("attacked") / "run"
    arguments = ["--model", "demo:model", "--edit", str(edit), *FEW, "--sample", "6", "--out", str(out)]
    assert main(["attack", "closed-form", *arguments, "--radius", "1", "--json"]) == 0
    return out


def test_the_closed_form_brings_weapons_back_and_chance_does_not(attacked: Path) -> None:
    """Positive control and negative one, on an edit that keeps every weapon's own prompt from showing it.

    Measured with 12 cases and 12 steps: none shows its weapon by its own prompt; eq. 8's embedding and the best ones of
    the prompt's own norm bring all back, random ones of eq. 8's norms none.
    """
    report = json.loads((attacked / "report.json").read_text())
    results = {one["name"]: one for one in report["results"]}
    assert list(results) == ["closed-form.derived", "closed-form.radius-1", "closed-form.random"]
    derived, chance = results["closed-form.derived"], results["closed-form.random"]
    assert derived["n"] >= 5
    assert derived["pre"] <= 1
    assert derived["asr"]["value"] >= 0.8
    assert chance["post"] <= derived["post"] - 3
    assert report["attack"] == {
        "names": list(results),
        "ridge": 0.1,
        "radii": [1.0],
        "control": True,
    }
    assert report["attacked"]["provenance"]["edit"]
    assert report["base"]["provenance"]["edit"] is None
    assert report["judged"]["settings"]["networks"]
    lines = [json.loads(line) for line in (attacked / "found.jsonl").read_text().splitlines()]
    assert {line["stopped"] for line in lines} <= {"pre", "closed form"}
    assert (attacked / "embeddings.safetensors").is_file()


def test_a_finished_run_is_read_and_replayed(
    attacked: Path, edit: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    shutil.copytree(attacked, out)
    before = (out / "report.json").read_bytes()
    arguments = ["--model", "demo:model", "--edit", str(edit), *FEW, "--sample", "6", "--out", str(out)]
    capsys.readouterr()
    runtimes = ("--runtime", f"edited=torch:demo:model?edit={edit}", "--runtime", "server=openai:http://localhost:9")
    # One that takes embeddings, and one that doesn't: nothing is sent to it.
    (out / "found.jsonl").write_text(
        "".join(line for line in (out / "found.jsonl").read_text().splitlines(True) if '"pre"' not in line)
    )
    assert main(["attack", "replay", str(out), *FEW, *runtimes, "--out", str(tmp_path / "replay"), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    edited, server = document["runtimes"]
    # Images of a batch and of one alone differ by rounding; the same model shows the same.
    assert all(one["measures"]["flips"]["value"] <= 1 for one in edited["results"])
    assert all("takes text, not embeddings" in one["not_replayed"] for one in server["results"])
    shutil.copy(attacked / "found.jsonl", out / "found.jsonl")
    assert main(["attack", "closed-form", *arguments, "--radius", "1"]) == 0
    captured = capsys.readouterr()
    assert "loading" not in captured.err
    assert "closed-form.derived" in captured.out
    assert (out / "report.json").read_bytes() == before


def test_bad_input_is_one_line(
    attacked: Path, edit: Path, tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = ("--out", str(tmp_path / "run"))
    demo = ("closed-form", "--model", "demo:model", *FEW, *out)
    ring = ("ring-a-bell-embedding", *demo[1:])
    (tmp_path / "onnx" / "unet").mkdir(parents=True)
    (tmp_path / "onnx" / "unet" / "model.onnx").write_bytes(b"")
    (tmp_path / "onnx" / "model_index.json").write_text("{}")
    onnx = str(tmp_path / "onnx")
    cases: dict[str, tuple[str, ...]] = {
        "has no gradients to attack with: name the diffusers folder": ("closed-form", "--model", onnx, *FEW, *out),
        "triton:http://h/m has no gradients": ("closed-form", "--model", "triton:http://h/m", *FEW, *out),
        "is not a folder: name a diffusers folder": ("closed-form", "--model", str(tmp_path / "no" / "x"), *FEW, *out),
        "no protocol is named": ("closed-form", "--model", "demo:model", "--protocol", "demo-weapon", *out),
        "coco-30k has no counting rule": ("closed-form", "--model", "demo:model", "--protocol", "coco-30k", *out),
        "needs its prompts": ("closed-form", "--model", "demo:model", "--protocol", "nudity-142", *out),
        "--set 'x': give NAME=VALUE": (*demo, "--set", "x"),
        "there is no such file or folder": (*demo, "--network", "320n=nowhere"),
        "--ridge 0: give a positive number": (*demo, "--ridge", "0"),
        "--radius: give each multiple once": (*demo, "--radius", "2", "--radius", "2"),
        "no concept: give one of --concept TEXT": ("ring-a-bell", "--model", "demo:model", *FEW, *out),
        "--style says what --concept TEXT is": (*ring, "--style", "--pairs", "pairs.csv"),
        "can't be used: population: 7 is odd": (
            *("ring-a-bell", *demo[1:], "--concept", "a gun", "--population", "7"),
        ),
        "eta: Input should be a finite number": ("ring-a-bell", *demo[1:], "--concept", "a gun", "--eta", "nan"),
        "--eta inf: give a finite number": (*ring, "--concept", "a gun", "--eta", "inf"),
        "2 concepts: give one": (*ring, "--concept", "a gun", "--vector", "v.npy"),
        "v.npy can't be read as a concept vector": (*ring, "--vector", "v.npy"),
        "nowhere": (*demo, "--runtime", "served=onnx:nowhere"),
        "is not a file": (*demo, "--edit", str(tmp_path / "none.safetensors")),
        "holds a run with another configuration": (
            *("closed-form", "--model", "demo:model", "--edit", str(edit), *FEW, "--sample", "6"),
            *("--radius", "2", "--out", str(attacked)),
        ),
        "can't be read": ("replay", str(tmp_path / "none"), *FEW, "--runtime", "a=torch:demo:model", *out),
    }
    for message, arguments in cases.items():
        assert message in failure(capsys, *arguments), arguments
    assert main(["attack", *demo, "--limit", "0"]) == 2
    assert "0 is not in the range" in capsys.readouterr().err
    assert main(["attack", "p4d-n", "--model", "demo:model", *FEW, *out]) == 2
    assert "--similarity" in capsys.readouterr().err


def test_a_model_that_shows_nothing_is_refused(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A random model paints no weapon: a rate of 0 would be no erasure's."""
    error = failure(
        capsys,
        *("closed-form", "--model", str(tiny_model), "--protocol", "demo-weapons", "--steps", "1", "--limit", "2"),
        *("--out", str(tmp_path / "run")),
    )
    assert "none of the unedited model's 2 images" in error


def options_of(command: str) -> dict[str, Any]:
    params = attack.commands[command].params
    return {one.name: one.default for one in params if isinstance(one, click.Option) and one.name != "patience"}


def test_the_published_budgets_are_the_defaults() -> None:
    from excise.eval.closed_form_attack import RADII, RIDGE
    from excise.eval.p4d import P4DSettings
    from excise.eval.ring_a_bell import RingABellSettings
    from excise.eval.unlearn_diff_atk import UnlearnDiffAtkSettings

    every: dict[str, BaseModel] = {
        "p4d-n": P4DSettings(),
        "p4d-k": P4DSettings(),
        "unlearn-diff-atk": UnlearnDiffAtkSettings(),
        "ring-a-bell": RingABellSettings(),
    }
    for command, settings in every.items():
        given = options_of(command)
        shared = set(given) & set(type(settings).model_fields)
        assert len(shared) >= 5
        assert {name: given[name] for name in shared} == {name: getattr(settings, name) for name in shared}
    assert (options_of("closed-form")["ridge"], options_of("closed-form")["radii"]) == (RIDGE, RADII)


def test_every_command_has_an_example() -> None:
    for name, command in attack.commands.items():
        assert "Example" in (command.help or ""), name
        assert f"excise attack {name}" in (command.help or ""), name


@pytest.mark.slow
def test_searches_find_text_and_it_is_replayed_on_an_export(
    edit: Path, demo_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Reduced budgets: that the parts fit, not how well an attack does."""
    from excise.editfile import load_edit
    from excise.export.onnx_export import export_pipeline

    export_pipeline(demo_model, tmp_path / "onnx", edit=load_edit(edit))
    searches = {
        "p4d-n": ("--iterations", "4", "--evaluate-every", "2", "--tokens", "4", "--similarity", "demo:clip"),
        "p4d-k": ("--iterations", "4", "--evaluate-every", "2", "--similarity", "demo:clip"),
        "unlearn-diff-atk": ("--timesteps", "2", "--iterations", "2", "--tokens", "2"),
        "ring-a-bell": ("--concept", "a gun", "--population", "8", "--generations", "4", "--tokens", "4"),
        "ring-a-bell-embedding": ("--concept", "a gun"),
    }
    for name, budget in searches.items():
        out = tmp_path / name
        command = ["attack", name, "--model", "demo:model", "--edit", str(edit), *FEW, "--sample", "2", *budget]
        capsys.readouterr()
        assert main([*command, "--runtime", f"served=onnx:{tmp_path / 'onnx'}", "--out", str(out), "--json"]) == 0
        document = json.loads(capsys.readouterr().out)
        (result,) = document["results"]
        assert (result["name"], result["n"]) == (name, 2)
        (served,) = document["replay"]["runtimes"][0]["results"]
        assert served["n"] == 2
        assert served["measures"]["flips"]["value"] == 0, name
        before = (out / "report.json").read_bytes()
        assert main([*command, "--out", str(out)]) == 0
        assert (out / "report.json").read_bytes() == before
