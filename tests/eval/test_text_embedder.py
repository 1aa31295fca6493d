"""Text encoders as a search asks them."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline

from excise.edit.families import FAMILIES
from excise.edit.text import text_fingerprint
from excise.errors import ArtefactError, ModelError, UsageError
from excise.eval.onnx_text_embedder import OnnxTextEmbedder
from excise.eval.text_embedder import TorchTextEmbedder, folder_embedder, pipeline_embedder

PROMPTS = ["a gun on red", "", "an owl"]


@pytest.fixture(scope="module")
def pipeline(tiny_model: Path) -> Any:
    return StableDiffusionPipeline.from_pretrained(tiny_model, safety_checker=None)


def test_embeddings_are_the_pipelines(pipeline: Any, tiny_model: Path) -> None:
    expected = pipeline.encode_prompt(PROMPTS, "cpu", 1, False)[0].detach().numpy()
    for embedder in (pipeline_embedder(pipeline), folder_embedder(tiny_model)):
        np.testing.assert_allclose(embedder.embed(embedder.tokens.read(PROMPTS)), expected, atol=1e-5)


def test_batches_change_nothing_and_no_row_gives_none(pipeline: Any) -> None:
    one = TorchTextEmbedder(pipeline.tokenizer, pipeline.text_encoder, batch_size=2)
    ids = one.tokens.read(PROMPTS)
    embeddings = one.embed(ids)
    np.testing.assert_allclose(embeddings, pipeline_embedder(pipeline).embed(ids), atol=1e-5)
    expected = np.square(embeddings - embeddings[0]).sum((1, 2))
    np.testing.assert_allclose(one.distances(ids, embeddings[0]), expected, rtol=1e-5, atol=1e-4)
    assert one.embed(ids[:0]).shape == (0, 24, 32)
    assert one.distances(ids[:0], embeddings[0]).shape == (0,)


def test_the_fingerprint_is_the_edit_files(demo_model: Path) -> None:
    family = next(one for one in FAMILIES if one.name == "stable-diffusion")
    assert folder_embedder(demo_model).fingerprint == text_fingerprint(demo_model, family)


def test_half_precision_is_searched_in_its_own_precision(pipeline: Any) -> None:
    full = pipeline_embedder(pipeline)
    ids = full.tokens.read(PROMPTS)
    embeddings = full.embed(ids)
    half = TorchTextEmbedder(pipeline.tokenizer, copy.deepcopy(pipeline.text_encoder).to(torch.bfloat16))
    assert half.embed(ids).dtype == np.float32
    apart = np.linalg.norm(half.embed(ids) - embeddings) / np.linalg.norm(embeddings)
    assert 1e-4 < apart < 0.1
    np.testing.assert_allclose(half.distances(ids, embeddings[0])[1:], full.distances(ids, embeddings[0])[1:], rtol=0.1)


def test_onnx_gives_what_pytorch_gives(demo_model: Path, tmp_path: Path) -> None:
    # The bundled graph reads the bundled model's own weights, under another name.
    exported = tmp_path / "onnx"
    shutil.copytree(demo_model.parent / "onnx" / "text_encoder", exported / "text_encoder")
    shutil.copyfile(
        demo_model / "text_encoder" / "model.safetensors", exported / "text_encoder" / "weights.safetensors"
    )
    shutil.copytree(demo_model / "tokenizer", exported / "tokenizer")
    torch_embedder, onnx = folder_embedder(demo_model), OnnxTextEmbedder(exported, threads=1, batch_size=2)
    ids = onnx.tokens.read(PROMPTS)
    assert np.array_equal(ids, torch_embedder.tokens.read(PROMPTS))
    embeddings = torch_embedder.embed(ids)
    np.testing.assert_allclose(onnx.embed(ids), embeddings, atol=2e-4)
    np.testing.assert_allclose(
        onnx.distances(ids, embeddings[0])[1:], torch_embedder.distances(ids, embeddings[0])[1:], rtol=1e-4
    )
    assert onnx.fingerprint != torch_embedder.fingerprint
    shutil.rmtree(exported / "tokenizer")
    with pytest.raises(ArtefactError, match="has no CLIP tokenizer"):
        OnnxTextEmbedder(exported, threads=1)


def test_models_that_can_not_be_searched(pipeline: Any, tmp_path: Path, tiny_model: Path) -> None:
    with pytest.raises(ModelError, match="the text encoder is a Linear: only CLIP's"):
        TorchTextEmbedder(pipeline.tokenizer, torch.nn.Linear(1, 1))
    with pytest.raises(ModelError, match="more than one text encoder"):
        pipeline_embedder(SimpleNamespace(text_encoder_2=1))
    with pytest.raises(UsageError, match=r"batch_size = 0, stride = 8: give 1 or more"):
        TorchTextEmbedder(pipeline.tokenizer, pipeline.text_encoder, batch_size=0)
    with pytest.raises(ModelError, match="has no text_encoder: name a diffusers folder"):
        folder_embedder(tmp_path)
    shutil.copytree(tiny_model / "text_encoder", tmp_path / "text_encoder")
    shutil.copytree(tiny_model / "tokenizer", tmp_path / "tokenizer")
    (tmp_path / "text_encoder" / "model.safetensors").write_bytes(b"broken")
    with pytest.raises(ModelError, match="no CLIP text encoder that transformers can load"):
        folder_embedder(tmp_path)
