"""``excise engines --for-triton``: from an export to a Triton repository of engines, by commands alone."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from excise import cli_engine, cli_serve_build
from excise.cli_vector_timestep import has_scalar_timestep, with_vector_timestep
from excise.enginefile import ENGINE, check_engine, read_engine
from excise.errors import ArtefactError, ExciseError, MissingExtra, OutputError, UsageError
from excise.export import engine_build
from excise.export.engine_library import EngineLibrary
from excise.export.engine_options import PipelineOptions
from excise.export.engine_pipeline import build_engines
from excise.export.patch import patch
from excise.export.pipeline import load_pipeline, read_weights
from excise.manifest import hash_file, read_manifest, verify
from excise.serve.onnx_signature import read_signature
from excise.serve.pbtxt import parse
from tests.export.engines import edit_of, needs_rtx
from tests.export.fake_tensorrt import Builder, DataType, FakeTensorRt, Network, Tensor
from tests.random_edits import random_edit

NETWORKS = ("text_encoder", "unet", "vae_decoder")
TYPES = {"float32": DataType.FLOAT, "float16": DataType.HALF, "int64": DataType.INT64, "bfloat16": DataType.BF16}


class ReadNetwork(Network):
    """A network with the inputs and outputs of the ONNX file that was parsed."""

    def read(self, path: str) -> None:
        signature = read_signature(Path(path))
        self.inputs, self.outputs = (
            [Tensor(name, TYPES[tensor.dtype], tensor.shape) for name, tensor in found.items()]
            for found in (signature.inputs, signature.outputs)
        )
        self.num_inputs, self.num_outputs = len(self.inputs), len(self.outputs)

    def get_input(self, index: int) -> Tensor:
        return self.inputs[index]

    def get_output(self, index: int) -> Tensor:
        return self.outputs[index]


class Parser:
    def __init__(self, network: ReadNetwork, logger: Any) -> None:
        self._network = network

    def parse_from_file(self, path: str) -> bool:
        self._network.read(path)
        return True


class ReadBuilder(Builder):
    def create_network(self, flags: int) -> Network:
        self.module.network = ReadNetwork(self.module)
        return self.module.network


class ReadingTensorRt(FakeTensorRt):
    """A stand-in for tensorrt whose engines take and give what the ONNX files do."""

    OnnxParser = Parser

    def Builder(self, logger: Any) -> Builder:
        return ReadBuilder(self, logger)


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The stand-in in the place of TensorRT, on a machine with a GPU; the libraries that were asked for."""
    asked: list[str] = []

    def load(name: str) -> EngineLibrary:
        asked.append(name)
        return EngineLibrary("tensorrt", ReadingTensorRt())

    monkeypatch.setattr(engine_build, "gpu_capability", lambda: "SM90")
    monkeypatch.setattr("excise.export.engine_library.load_library", load)
    return asked


@pytest.fixture(scope="module")
def served(plain: Path, tiny_model: Path, sites: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model's export with an edit. Not to be changed by tests."""
    out = tmp_path_factory.mktemp("served") / "onnx"
    patch(plain, edit_of(tiny_model, sites), out=out)
    return out


def excise(*given: object) -> None:
    """One command as the command line runs it; errors are raised."""
    words = [str(one) for one in given]
    if words[0] == "excise":
        del words[0]
    if words[0] == "engines":
        cli_engine.engines.main(args=words[1:], prog_name="excise engines", standalone_mode=False)
        return
    assert words[0] == "serve"
    command = getattr(cli_serve_build, words[1])
    command.main(args=words[2:], prog_name="excise serve", standalone_mode=False)


def contents(folder: Path) -> dict[str, str]:
    return {path.relative_to(folder).as_posix(): hash_file(path) for path in folder.rglob("*") if path.is_file()}


def command_in(error: BaseException) -> Sequence[str]:
    """The command that a message names."""
    found = re.search(r"excise engines .*(?=, and name that folder$)", str(error))
    assert found is not None, str(error)
    return shlex.split(found[0])


def test_an_export_becomes_a_repository_by_the_commands_that_the_errors_name(
    served: Path, library: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, models = tmp_path / "my onnx", tmp_path / "models"
    shutil.copytree(served, folder)
    before = contents(folder)
    build = ("serve", "build", "--out", models, "--backend", "tensorrt", "--gpu", "0", "--no-canary")
    with pytest.raises(ArtefactError, match=r"its UNet takes a scalar timestep, and Triton takes no scalar") as caught:
        excise(*build, folder)
    command = command_in(caught.value)
    assert "--for-triton" in command
    excise(*command)
    engines = Path(command[-1])
    assert engines == tmp_path / "my onnx-engines"
    assert library == ["tensorrt"]
    assert contents(folder) == before, "the export stays as it is"
    assert verify(engines) == []
    assert read_engine(engines / "unet" / ENGINE).inputs["timestep"].shape == (1,)
    assert [check_engine(engines / name / ENGINE) for name in NETWORKS] == [[], [], []]
    assert read_manifest(engines).edit == read_manifest(folder).edit
    capsys.readouterr()

    excise(*build, engines)
    capsys.readouterr()
    excise("serve", "check", models, "--json")
    assert json.loads(capsys.readouterr().out)["sound"]
    config = parse((models / "unet" / "config.pbtxt").read_text(), "config.pbtxt")
    (timestep,) = (one for one in config.messages("input") if one.text("name") == "timestep")
    assert timestep.all("dims") == (1,)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["models", "my onnx", "my onnx-engines"]


def test_engines_with_a_scalar_are_refused_with_the_command(served: Path, library: list[str], tmp_path: Path) -> None:
    engines = tmp_path / "engines"
    excise("engines", served, "--library", "tensorrt", "--out", engines)
    assert read_engine(engines / "unet" / ENGINE).inputs["timestep"].shape == ()
    build = ("serve", "build", "--out", tmp_path / "models", "--backend", "tensorrt", "--gpu", "0", "--no-canary")
    with pytest.raises(ArtefactError) as caught:
        excise(*build, engines)
    excise(*command_in(caught.value))
    made = tmp_path / "engines-engines"
    excise(*build, made)
    # what doesn't depend on the timestep isn't built again
    same = {name: (made / name / ENGINE).samefile(engines / name / ENGINE) for name in NETWORKS}
    assert same == {"text_encoder": True, "unet": False, "vae_decoder": True}


def test_an_edit_later_needs_no_new_folder(
    served: Path,
    library: list[str],
    tiny_model: Path,
    sites: tuple[str, ...],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A folder that has the vector already is replaced in place, and only the UNet's engine is built."""
    excise("engines", served, "--for-triton", "--out", tmp_path / "one")
    weights = read_weights(load_pipeline(tiny_model).unet, list(sites))
    other = random_edit({name: np.array(values) for name, values in weights.items()}, 2)
    patch(tmp_path / "one", other, out=tmp_path / "two")
    unet = hash_file(tmp_path / "two" / "unet" / "model.onnx")
    capsys.readouterr()
    excise("engines", tmp_path / "two", "--for-triton")
    said = capsys.readouterr().err
    assert [line for line in said.splitlines() if "building" in line] == [
        "excise: building unet/model.engine with tensorrt 10.0-fake"
    ]
    assert hash_file(tmp_path / "two" / "unet" / "model.onnx") == unet
    assert verify(tmp_path / "two") == []
    with pytest.raises(OutputError, match="an engine of each of its models already"):
        excise("engines", tmp_path / "two", "--for-triton")


def test_nothing_is_replaced_in_place(served: Path, library: list[str], tmp_path: Path) -> None:
    folder = tmp_path / "onnx"
    shutil.copytree(served, folder)
    before = contents(folder)
    with pytest.raises(UsageError, match=r"would change the UNet's graph in .*: give a new folder, --out \S+onnx-eng"):
        excise("engines", folder, "--for-triton")
    assert contents(folder) == before
    assert library == [], "it is told before the library is loaded"


def test_tensorrt_rtx_is_refused(served: Path, library: list[str], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="Triton loads engines of tensorrt alone"):
        excise("engines", served, "--for-triton", "--library", "tensorrt-rtx", "--out", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_messages_name_the_folder_that_was_given(
    served: Path, library: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Not the one for the time being; and whatever fails, nothing is left."""
    folder, out = tmp_path / "onnx", tmp_path / "out"
    excise("engines", served, "--library", "tensorrt", "--out", folder)
    options = tmp_path / "engines.yaml"
    options.write_text("optimization_level: 1\n")
    cases: list[tuple[type[ExciseError], str, tuple[object, ...], Callable[[bytes], bytes]]] = [
        (OutputError, "built with other options", ("--options", options), bytes),
        (ArtefactError, "vae_decoder/model.onnx was altered", (), lambda data: data[:-1] + bytes([data[-1] ^ 1])),
        (ArtefactError, "vae_decoder/model.onnx was altered", (), lambda data: data[:-1]),
    ]
    for kind, message, more, change in cases:
        if kind is ArtefactError:
            sound = (folder / "vae_decoder/model.onnx").read_bytes()
            (folder / "vae_decoder/model.onnx").unlink()
            (folder / "vae_decoder/model.onnx").write_bytes(change(sound))
        with pytest.raises(kind) as caught:
            excise("engines", folder, "--for-triton", "--out", out, *more)
        text = str(caught.value) + capsys.readouterr().err
        assert message in str(caught.value)
        assert str(folder) in str(caught.value)
        assert ".excise-partial" not in text
    assert sorted(path.name for path in tmp_path.iterdir()) == ["engines.yaml", "onnx"]


def test_a_missing_library_is_told_before_the_graph_is_written(
    served: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(name: str) -> Any:
        raise MissingExtra(name, name)

    monkeypatch.setattr("excise.export.engine_library.load_library", missing)
    with pytest.raises(MissingExtra, match=r"pip install 'excise\[tensorrt\]'"):
        excise("engines", served, "--for-triton", "--out", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_folders_without_a_name() -> None:
    assert cli_engine.engines_folder(Path("sd-onnx")) == Path("sd-onnx-engines")
    here = Path.cwd()
    assert cli_engine.engines_folder(Path(".")) == here.with_name(f"{here.name}-engines")


@needs_rtx
def test_the_real_library_builds_the_vector(served: Path, tmp_path: Path) -> None:
    """By TensorRT-RTX, which needs no GPU to build: its parser takes the graph, and the engine has the vector.

    Triton doesn't load its engines, which ``serve build`` says.
    """
    options = PipelineOptions.model_validate({"images": {"max": 1}, "optimization_level": 0})
    with with_vector_timestep(served, tmp_path / "out") as folder:
        assert not has_scalar_timestep(folder)
        entries = build_engines(folder, "tensorrt-rtx", options, out=tmp_path / "out")
    assert entries["unet"].inputs["timestep"].shape == (1,)
    assert verify(tmp_path / "out") == []
    assert np.all([check_engine(tmp_path / "out" / name / ENGINE) == [] for name in NETWORKS])
    with pytest.raises(UsageError, match="is TensorRT-RTX's, which Triton doesn't load"):
        excise("serve", "build", tmp_path / "out", "--out", tmp_path / "models", "--backend", "tensorrt", "--gpu", "0")
