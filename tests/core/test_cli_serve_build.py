"""``excise serve build``, ``promote``, ``rollback``, ``status`` and ``check`` as a user types them."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

import click
import pytest
from safetensors.numpy import load_file

from excise.cli import main
from excise.cli_serve_build import build, check, promote, rollback, status
from excise.editfile import Edit, save_edit
from excise.errors import ExciseError, UsageError
from excise.export.patch import patch
from excise.serve.repository_record import read_record
from tests.random_edits import random_edit

COMMANDS = {command.name: command for command in (build, promote, rollback, status, check)}


def run(*given: object) -> int:
    """One command of the group, with the exit status that ``excise`` would have for what isn't an error."""
    arguments = [str(one) for one in given]
    try:
        COMMANDS[arguments[0]].main(args=arguments[1:], prog_name="excise serve", standalone_mode=False)
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


@pytest.fixture(scope="module")
def edits(tiny_model: Path) -> tuple[Edit, Edit]:
    weights = load_file(tiny_model / "unet" / "diffusion_pytorch_model.safetensors")
    sites = {name: w for name, w in weights.items() if name.endswith(("attn2.to_k.weight", "attn2.to_v.weight"))}
    return random_edit(sites, 1, scale=0.5), random_edit(sites, 2, scale=0.5)


@pytest.fixture(scope="module")
def export(tiny_model: Path, edits: tuple[Edit, Edit], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model exported with the first edit. Not to be changed by tests."""
    from diffusers import StableDiffusionPipeline

    place = tmp_path_factory.mktemp("onnx")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the tracer's, by the dozen
        from optimum.exporters.onnx import onnx_export_from_model

        pipeline = StableDiffusionPipeline.from_pretrained(tiny_model)
        onnx_export_from_model(pipeline, place / "plain", task="text-to-image")
    patch(place / "plain", edits[0], out=place / "edited", link=False)
    return place / "edited"


@pytest.fixture(scope="module")
def second(edits: tuple[Edit, Edit], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file of the second edit."""
    file = tmp_path_factory.mktemp("edit") / "second.safetensors"
    save_edit(file, edits[1])
    return file


def test_from_build_to_rollback(
    export: Path, edits: tuple[Edit, Edit], second: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    repo = tmp_path / "models"
    options = ("--name", "pictures", "--max-batch", 4, "--queue", 9, "--threads", 1, "--resource", "memory=2")
    assert run("build", export, "--out", repo, *options, "--json") == 0
    told = capsys.readouterr()
    assert "recording the canary" in told.err
    document = json.loads(told.out)
    assert document["repository"] == str(repo)
    assert document["record"]["current"] == 1
    text = (repo / "pictures" / "config.pbtxt").read_text()
    assert "max_batch_size: 4" in text
    assert "max_queue_size: 9" in text
    probes = json.loads((repo / "pictures/1/canary.json").read_text())["probes"]
    assert "concept 1" in [probe["prompt"] for probe in probes if probe["erased"]]

    assert run("promote", repo, "--edit", second, "--keep", 2) == 0
    told = capsys.readouterr()
    assert "switching from version 1 to 2" in told.err
    assert edits[1].id[:12] in told.out
    assert "current" in told.out
    probes = json.loads((repo / "pictures/2/canary.json").read_text())["probes"]
    assert "concept 2" in [probe["prompt"] for probe in probes if probe["erased"]]

    assert run("check", repo) == 0
    assert "sound" in capsys.readouterr().out
    assert run("rollback", repo, "--json") == 0
    assert json.loads(capsys.readouterr().out)["record"]["previous"] is None
    assert run("status", repo) == 0
    assert "version   1    current" in capsys.readouterr().out
    assert main(["inspect", str(repo)]) == 0
    assert "a Triton repository" in capsys.readouterr().out
    assert read_record(repo).current == 1

    (repo / "pictures/1/model.py").write_text("import os")
    assert run("check", repo, "--json") == 1
    found = json.loads(capsys.readouterr().out)
    assert not found["sound"]
    assert "model.py was altered" in found["problems"][0]
    assert main(["inspect", str(repo)]) == 1


def test_a_folder_from_elsewhere_with_names_and_a_policy(
    export: Path, second: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    repo, policy = tmp_path / "models", tmp_path / "tenants.yaml"
    assert run("build", export, "--out", repo, "--no-canary", "--backend", "onnxruntime") == 0
    assert "whose timestep has shape (1)" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["models"]
    assert not (repo / "excise/1/canary.json").exists()
    text = (repo / "unet/config.pbtxt").read_text()
    assert "reshape" not in text
    assert re.search(r'name: "timestep"\s+data_type: \w+\s+dims: 1$', text, re.MULTILINE)
    assert (repo / "unet/1/model.onnx").samefile(repo / "excise/1/onnx/unet/model.onnx")
    assert (repo / "vae_decoder/1/model.onnx").samefile(export / "vae_decoder/model.onnx")
    from excise.editfile import load_edit

    edit = load_edit(second)
    patch(export, edit, out=tmp_path / "new", link=False)
    policy.write_text("format: 1\ntenants:\n  studio: [quiet]\n")
    named = ("--policy", policy, "--edit-name", f"quiet={edit.id[:8]}")
    assert run("promote", repo, "--from", tmp_path / "new", "--no-canary", *named) == 0
    assert list(read_record(repo).versions[2].edits) == ["quiet"]
    assert (repo / "vae_decoder/2/model.onnx").samefile(repo / "vae_decoder/1/model.onnx")
    assert json.loads((repo / "excise/2/policy.json").read_text())["tenants"] == {"studio": ["quiet"]}
    assert run("check", repo) == 0
    assert "has no canary" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["build", "{onnx}", "--out", "{out}", "--gpu", "0", "--provider", "cpu"], "none for cpu"),
        (["build", "{onnx}", "--out", "{out}", "--name", "unet"], "is a network's"),
        (["build", "{onnx}", "--out", "{out}", "--resource", "memory"], "--resource 'memory': give NAME=VALUE"),
        (["build", "{onnx}", "--out", "{out}", "--resource", "memory=many"], "resources.memory"),
        (["build", "{onnx}", "--out", "{out}", "--edit-name", "a=b"], "edit name a=b"),
        (["build", "{onnx}", "--out", "{out}", "--policy", "{onnx}/excise.json"], "excise.json: "),
        (["build", "{onnx}", "--out", "{onnx}"], "not empty"),
        (["build", "{onnx}/unet", "--out", "{out}"], "no excise.json"),
        (["promote", "{onnx}", "--edit", "x", "--from", "y"], "one of them"),
        (["promote", "{onnx}", "--from", "y"], "no repository of excise"),
        (["promote", "{onnx}", "--from", "y", "--url", "nonsense"], "give Triton's HTTP address"),
        (["rollback", "{onnx}"], "no repository of excise"),
        (["status", "{onnx}", "--url", "http://127.0.0.1:9"], "no repository of excise"),
        (["check", "{onnx}"], "no repository of excise"),
    ],
)
def test_what_a_user_can_get_wrong(export: Path, tmp_path: Path, given: Sequence[str], message: str) -> None:
    with pytest.raises(ExciseError) as caught:
        run(*(one.format(onnx=export, out=tmp_path / "out") for one in given))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_errors_name_the_folder_that_was_given(
    export: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Not the one for the time being, whose UNet takes a vector."""
    folder, repo = Path(shutil.copytree(export, tmp_path / "broken")), tmp_path / "models"
    assert run("build", export, "--out", repo, "--no-canary", "--backend", "onnxruntime") == 0
    for path in ("unet/edit.onnx_data", "unet/model.onnx"):
        sound = (folder / path).read_bytes()
        (folder / path).write_bytes(sound[:-1] + bytes([sound[-1] ^ 1]))
        for command in (
            ("build", folder, "--out", tmp_path / "other", "--backend", "onnxruntime"),
            ("promote", repo, "--from", folder),
        ):
            with pytest.raises(ExciseError) as caught:
                run(*command, "--no-canary")
            assert str(folder) in str(caught.value)
            assert f"{path} was altered" in str(caught.value)
            assert ".excise-partial" not in str(caught.value) + capsys.readouterr().err
        (folder / path).write_bytes(sound)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["broken", "models"]
    assert read_record(repo).current == 1


def test_an_edit_of_another_model_changes_nothing(export: Path, tmp_path: Path, edits: tuple[Edit, Edit]) -> None:
    repo = tmp_path / "models"
    assert run("build", export, "--out", repo, "--no-canary") == 0
    weights = load_file(export / "unet" / "base.safetensors")
    other = random_edit({name: 2 * weight for name, weight in weights.items()}, 3)
    save_edit(tmp_path / "other.safetensors", other)
    before = sorted(path.relative_to(repo) for path in repo.rglob("*"))
    with pytest.raises(ExciseError, match="made for another model"):
        run("promote", repo, "--edit", tmp_path / "other.safetensors", "--no-canary")
    assert sorted(path.relative_to(repo) for path in repo.rglob("*")) == before


def test_every_command_shows_an_example() -> None:
    for command in COMMANDS.values():
        assert isinstance(command, click.Command)
        assert "Examples:" in str(command.help)


def test_nothing_heavy_is_imported(tmp_path: Path, export: Path) -> None:
    repo = tmp_path / "models"
    shutil.copytree(export, tmp_path / "onnx")
    code = (
        "import sys\n"
        "from excise.cli_serve_build import build, status\n"
        "assert not {'torch', 'onnxruntime', 'httpx', 'pydantic'} & set(sys.modules)\n"
        f"build.main([{str(tmp_path / 'onnx')!r}, '--out', {str(repo)!r}], standalone_mode=False)\n"
        f"status.main([{str(repo)!r}], standalone_mode=False)\n"
        "assert not {'torch', 'onnx', 'httpx', 'diffusers', 'tritonclient'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, timeout=120)


def test_two_sources_are_one_too_many() -> None:
    with pytest.raises(UsageError):
        run("promote", "anywhere")
