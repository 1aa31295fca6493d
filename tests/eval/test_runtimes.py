"""Runtimes by name: what a specification may say, what is opened, and what is known of it."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from excise.edit.erase import erase
from excise.edit.recipe import resolve
from excise.editfile import Edit, load_edit, save_edit
from excise.errors import ArtefactError, EditError, ExciseError, ModelError, UsageError
from excise.eval.endpoint_openai import OpenAIRuntime
from excise.eval.endpoint_triton import TritonRuntime
from excise.eval.evaluation import Provenance
from excise.eval.runtimes import (
    check_runtime,
    open_runtime,
    parse_runtime,
    parse_runtimes,
    provenance,
)
from excise.eval.torch_runtime import TorchRuntime
from excise.export.onnx_export import export_pipeline
from excise.export.pipeline import load_pipeline
from excise.manifest import hash_file, hash_folder
from excise.onnx_metadata import EDIT_ID, write_metadata
from excise.serve.onnx_runtime import OnnxRuntime
from excise.serve.runtime import Request
from tests.eval.fake_endpoint import Answer, fake_endpoint

REQUESTS = [Request("a gun", seed=1), Request("a cat", seed=2), Request("a dog", seed=3)]


@pytest.fixture(scope="module")
def edit_file(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("edit") / "gun+knife.safetensors"
    save_edit(path, erase(tiny_model, resolve(None, None, {"erase": ["gun"], "to": ["sunflower"], "keep": ["cat"]})))
    return path


@pytest.fixture(scope="module")
def edit(edit_file: Path) -> Edit:
    return load_edit(edit_file)


@pytest.fixture(scope="module")
def exported(tiny_model: Path, edit: Edit, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("exported") / "onnx"
    export_pipeline(tiny_model, out, edit=edit)
    return out


def test_specifications(tiny_model: Path, exported: Path) -> None:
    one = parse_runtime(f"onnx-gpu=onnx:{exported}?provider=cuda&batch_size=16")
    assert (one.name, one.kind, one.place) == ("onnx-gpu", "onnx", str(exported))
    assert one.options == {"provider": "cuda", "batch_size": "16"}
    assert str(one) == one.source == f"onnx:{exported}?provider=cuda&batch_size=16"
    assert str(one.side) == f"onnx:{exported}?provider=cuda"
    assert parse_runtime(f"a={tiny_model}").kind == "torch"
    assert parse_runtime(f"a={exported}?threads=2").kind == "onnx"
    demo = parse_runtime("base=demo:model?dtype=float16")
    assert (demo.kind, Path(demo.place).name, str(demo)) == ("torch", "model", "demo:model?dtype=float16")
    assert parse_runtime("base=torch:demo:model").place == demo.place
    server = parse_runtime("t=triton:http://host:8000/v/sd-safe?timeout=2.5&retries=0")
    assert (server.endpoint.url, server.endpoint.timeout, server.endpoint.retries) == ("http://host:8000/v", 2.5, 0)
    assert parse_runtime("o=openai:https://host/?size=512x768").place == "https://host"
    assert parse_runtime("e=tensorrt:engines").kind == "tensorrt"
    assert parse_runtime(f"a=torch:{tiny_model}?edit=a b.safetensors").side.options == {"edit": "a b.safetensors"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("onnx:DIR", "has no name: write NAME=KIND:PLACE"),
        ("torch:DIR?edit=a.safetensors", "has no name"),
        ("a=", "has no name"),
        ("a b=onnx:DIR", "'a b' can't name a runtime"),
        ("..=onnx:DIR", "'..' can't name a runtime"),
        ("a=onxx:DIR", "onxx:DIR: 'onxx' isn't one of torch, onnx, tensorrt, triton, openai"),
        ("a=nowhere", "nowhere isn't a folder"),
        (
            "a=onnx:DIR?dtype=float16",
            "onnx has no option 'dtype', only provider, edit, sld, sld_concept, batch_size, threads",
        ),
        ("a=onnx:DIR?provider=gpu", "provider='gpu' isn't one of cpu, cuda, tensorrt"),
        ("a=onnx:DIR?batch_size=0", "batch_size='0' isn't an integer from 1"),
        ("a=torch:DIR?threads=many", "threads='many' isn't an integer from 1"),
        ("a=torch:DIR?batch_size=²", "batch_size='²' isn't an integer from 1"),
        ("a=tensorrt:DIR?device=0", "tensorrt has no option 'device', only a folder"),
        ("a=triton:http://host:8000", "names no model: write triton:http://HOST:PORT/MODEL"),
        ("a=triton:host:8000/sd", "'host:8000/sd' isn't an address"),
        ("a=triton:http://host/sd?size=1x1", "triton has no option 'size'"),
        ("a=openai:ftp://host", "'ftp://host' isn't an address"),
        ("a=openai:http://me:word@host", "the address of host holds a password"),
        ("a=openai:http://host?size=big", "size='big' isn't WIDTHxHEIGHT"),
        ("a=openai:http://host?timeout=inf", "timeout='inf' isn't a number of seconds"),
        ("a=openai:http://host?concurrency=65", "concurrency='65' isn't an integer from 1 to 64"),
        ("a=openai:http://host?key_env=sk-123", "key_env='sk-123' isn't the name of an environment variable"),
    ],
)
def test_specifications_that_can_not_be_used(text: str, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_runtime(text)
    assert message in str(caught.value)


def test_names_are_distinct(tiny_model: Path) -> None:
    assert [one.name for one in parse_runtimes([f"b=torch:{tiny_model}", f"a=torch:{tiny_model}"])] == ["b", "a"]
    with pytest.raises(UsageError, match="two runtimes are called 'Served'"):
        parse_runtimes([f"Served=torch:{tiny_model}", f"served=torch:{tiny_model}"])
    with pytest.raises(UsageError, match="no runtime was named"):
        parse_runtimes([])


def test_what_is_missing_is_told_before_anything_is_loaded(tmp_path: Path, exported: Path) -> None:
    cases: list[tuple[str, type[ExciseError], str]] = [
        ("a=tensorrt:engines", UsageError, "serve it and name triton:URL/MODEL or openai:URL, or name its ONNX files"),
        (f"a=onnx:{tmp_path}", ArtefactError, r"has no text_encoder/model\.onnx"),
        (f"a=torch:{tmp_path}", ModelError, "is not a diffusers folder"),
        (f"a=onnx:{exported}?edit={tmp_path}/none.safetensors", EditError, "none.safetensors"),
        ("a=openai:http://host?key_env=NOT_SET_ANYWHERE", UsageError, "there is no such environment variable"),
    ]
    for text, kind, message in cases:
        for use in (check_runtime, lambda spec: open_runtime(spec, load_pipeline)):
            with pytest.raises(kind, match=message):
                use(parse_runtime(text))


def test_an_opened_runtime_is_its_own_class_with_its_options(tiny_model: Path, exported: Path) -> None:
    def opened(text: str) -> Any:
        return open_runtime(parse_runtime(text), load_pipeline)

    onnx, torch = opened(f"o=onnx:{exported}?batch_size=2"), opened(f"t=torch:{tiny_model}")
    assert isinstance(onnx, OnnxRuntime)
    assert isinstance(torch, TorchRuntime)
    assert (onnx.name, onnx.batch_size, torch.name, torch.batch_size) == ("o", 2, "t", 8)
    triton = opened("s=triton:http://host:8000/sd?batch_size=3&concurrency=2")
    assert isinstance(triton, TritonRuntime)
    assert (triton.name, triton.batch_size, triton.concurrency, triton.endpoint.url) == ("s", 3, 2, "http://host:8000")
    openai = opened("s=openai:http://host?size=512x768&concurrency=2")
    assert isinstance(openai, OpenAIRuntime)
    assert (openai.image_size, openai.concurrency, openai.batch_size) == ((768, 512), 2, 1)


def test_torch_and_export_draw_the_same(tiny_model: Path, exported: Path, edit_file: Path) -> None:
    texts = (f"t=torch:{tiny_model}?edit={edit_file.as_posix().replace('+', '%2B')}", f"o=onnx:{exported}")
    images = [
        open_runtime(parse_runtime(text), load_pipeline)
        .generate(REQUESTS, num_inference_steps=3, guidance_scale=5.0)
        .astype(int)
        for text in texts
    ]
    assert images[0].shape == (3, 16, 16, 3)
    assert np.abs(images[0] - images[1]).max() <= 1
    base = open_runtime(parse_runtime(f"b=torch:{tiny_model}"), load_pipeline)
    unedited = base.generate(REQUESTS, num_inference_steps=3, guidance_scale=5.0).astype(int)
    assert np.abs(images[0] - unedited).max() > 1


def test_threads_of_pytorch_are_put_back(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    during: list[int] = []
    generate = TorchRuntime.generate

    def watched(self: TorchRuntime, *arguments: Any, **options: Any) -> Any:
        during.append(torch.get_num_threads())
        return generate(self, *arguments, **options)

    monkeypatch.setattr(TorchRuntime, "generate", watched)
    before = torch.get_num_threads()
    runtime = open_runtime(parse_runtime(f"t=torch:{tiny_model}?threads={before + 1}"), load_pipeline)
    assert runtime.name == "t"
    runtime.generate(REQUESTS[:1], num_inference_steps=1)
    assert during == [before + 1]
    assert torch.get_num_threads() == before


def test_provenance_of_an_export(exported: Path, edit: Edit, tmp_path: Path) -> None:
    found = provenance(parse_runtime(f"o=onnx:{exported}"))
    assert (found.edit, found.edit_summary, found.intact, found.problems) == (edit.id, edit.summary, True, ())
    assert found.manifest == hash_file(exported / "excise.json")
    assert set(found.precision) == {"text_encoder", "unet", "vae_decoder"}
    assert "float32" in found.precision["unet"]

    altered = Path(shutil.copytree(exported, tmp_path / "altered"))
    with (altered / "tokenizer" / "vocab.json").open("a") as stream:
        stream.write(" ")
    found = provenance(parse_runtime(f"o=onnx:{altered}"))
    assert found.intact is False
    assert len(found.problems) == 1
    assert "tokenizer/vocab.json was altered" in found.problems[0]

    (altered / "excise.json").unlink()
    found = provenance(parse_runtime(f"o=onnx:{altered}"))
    assert (found.edit, found.manifest, found.intact) == (edit.id, None, None)


def test_a_manifest_that_names_another_edit_is_a_problem(exported: Path, edit: Edit, tmp_path: Path) -> None:
    mixed = Path(shutil.copytree(exported, tmp_path / "mixed"))
    model = mixed / "unet" / "model.onnx"
    model.unlink()
    write_metadata(exported / "unet" / "model.onnx", model, {EDIT_ID: "other"})
    found = provenance(parse_runtime(f"o=onnx:{mixed}"))
    assert (found.edit, found.edit_summary, found.intact) == ("other", None, False)
    assert found.problems[0].startswith("unet/model.onnx was altered")
    assert found.problems[1] == f"excise.json names the edit {edit.id}, and the ONNX files carry other"


def test_provenance_of_pytorch(tiny_model: Path, edit: Edit, edit_file: Path, exported: Path) -> None:
    found = provenance(parse_runtime(f"t=torch:{tiny_model}?dtype=float16"))
    assert (found.edit, found.manifest, found.intact) == (None, None, None)
    assert found.files == hash_folder(tiny_model)
    assert provenance(parse_runtime(f"o=onnx:{exported}")).files is None
    assert found.precision == {"text_encoder": "float16", "unet": "float16", "vae": "float16"}
    named = edit_file.as_posix().replace("+", "%2B")
    for text in (f"t=torch:{tiny_model}?edit={named}", f"o=onnx:{exported}?edit={named}"):
        found = provenance(parse_runtime(text))
        assert (found.edit, found.edit_summary) == (edit.id, edit.summary)


def test_provenance_of_servers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    listed = [
        {"id": "sd", "edit": {"edit_id": "ab"}, "manifest": "cd"},
        {"id": "sd:base", "edit": {"edit_id": None}, "manifest": "cd"},
        {"id": "gpt-image-1"},
    ]
    with fake_endpoint(lambda _: Answer({"object": "list", "data": listed})) as server:
        for query, found_there in (
            ("", ("ab", "cd")),
            ("?model=sd:base", (None, "cd")),
            ("?model=other", (None, None)),
        ):
            found = provenance(parse_runtime(f"o=openai:{server.url}{query}"))
            assert (found.edit, found.manifest) == found_there
    with fake_endpoint(lambda _: Answer({"object": "list", "data": [{"id": "gpt-image-1"}]})) as server:
        assert provenance(parse_runtime(f"o=openai:{server.url}")) == Provenance()
    parameters = {"excise.edit_id": {"string_value": "ab"}}
    with fake_endpoint(lambda _: Answer({"parameters": parameters})) as server:
        found = provenance(parse_runtime(f"s=triton:{server.url}/sd"))
    assert (found.edit, found.intact) == ("ab", None)
    with pytest.raises(UsageError, match="can't be reached"):
        provenance(parse_runtime(f"s=triton:{server.url}/sd?retries=0"))


def test_nothing_of_this_imports_pytorch() -> None:
    modules = ("image_file", "image_generation", "run_folder", "runtime_spec", "runtimes", "endpoint_openai")
    code = "import sys\n" + "".join(f"import excise.eval.{name}\n" for name in modules)
    code += "heavy = {'torch', 'matplotlib', 'httpx', 'ray', 'diffusers'} & set(sys.modules)\n"
    code += "assert not heavy, heavy"
    subprocess.run([sys.executable, "-c", code], check=True)
