"""Concept vectors, and the pairs that they are made of."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from excise.errors import ArtefactError, FingerprintMismatch, NumericsError, OutputError, PromptTooLong, UsageError
from excise.eval.concept_pairs import SCENES, PromptPair, paired, read_pairs, template_pairs
from excise.eval.concept_vector import ConceptVector, VectorMetadata, concept_vector, load_vector, save_vector
from excise.eval.text_embedder import TorchTextEmbedder, folder_embedder

PAIRS = paired(["a gun on red", "a gun", "a big gun"], ["red", "a picture", "big"])


@pytest.fixture(scope="module")
def embedder(tiny_model: Path) -> TorchTextEmbedder:
    return folder_embedder(tiny_model)


def test_the_vector_is_the_mean_difference(embedder: TorchTextEmbedder) -> None:
    vector = concept_vector(embedder, PAIRS, "gun")
    differences = [
        embedder.embed(embedder.tokens.read([one.shown]))[0].astype(np.float64)
        - embedder.embed(embedder.tokens.read([one.absent]))[0]
        for one in PAIRS
    ]
    np.testing.assert_allclose(vector.values, sum(differences) / 3, atol=1e-5)
    assert vector.values.dtype == np.float32
    assert np.abs(vector.values[1:]).max() > 0.1
    # The start token sees nothing but itself.
    np.testing.assert_allclose(vector.values[0], 0, atol=1e-6)
    assert (vector.metadata.pairs, vector.metadata.text_encoder) == (3, embedder.fingerprint)


def test_every_pair_weighs_the_same_in_any_batches(embedder: TorchTextEmbedder) -> None:
    small = folder_embedder_of(embedder, batch_size=2)
    one, other = concept_vector(embedder, PAIRS, "gun"), concept_vector(small, PAIRS, "gun")
    np.testing.assert_allclose(one.values, other.values, atol=1e-5)
    assert one.metadata == other.metadata
    assert one.metadata.pairs_sha256 != concept_vector(embedder, PAIRS[:2], "gun").metadata.pairs_sha256


def folder_embedder_of(embedder: TorchTextEmbedder, batch_size: int) -> TorchTextEmbedder:
    return TorchTextEmbedder(embedder.tokens._tokenizer, embedder._model, batch_size=batch_size)


def test_a_file_gives_the_vector_back_and_is_never_replaced(embedder: TorchTextEmbedder, tmp_path: Path) -> None:
    vector = concept_vector(embedder, PAIRS, "gun")
    save_vector(tmp_path / "gun.safetensors", vector)
    back = load_vector(tmp_path / "gun.safetensors")
    assert np.array_equal(back.values, vector.values)
    assert back.metadata == vector.metadata
    back.check(embedder)
    with pytest.raises(OutputError, match="exists already"):
        save_vector(tmp_path / "gun.safetensors", vector)


def test_published_arrays_are_read(embedder: TorchTextEmbedder, tmp_path: Path) -> None:
    values = np.ones((24, 32), np.float64)
    for array in (values, values[None]):
        np.save(tmp_path / "Some_vector.npy", array)
        vector = load_vector(tmp_path / "Some_vector.npy")
        assert vector.values.shape == (24, 32)
        assert vector.values.dtype == np.float32
        vector.check(embedder)


def test_files_that_are_no_vector(tmp_path: Path) -> None:
    with pytest.raises(ArtefactError, match="can't be read as a concept vector"):
        load_vector(tmp_path / "none.safetensors")
    (tmp_path / "text.safetensors").write_text("v")
    with pytest.raises(ArtefactError, match="can't be read as a concept vector"):
        load_vector(tmp_path / "text.safetensors")
    save_file({"vector": np.ones((2, 2), np.float32)}, tmp_path / "bare.safetensors")
    with pytest.raises(ArtefactError, match="is no concept vector of this version"):
        load_vector(tmp_path / "bare.safetensors")
    np.save(tmp_path / "objects.npy", np.array([{}], object), allow_pickle=True)
    with pytest.raises(ArtefactError, match="can't be read as a concept vector"):
        load_vector(tmp_path / "objects.npy")
    np.save(tmp_path / "whole.npy", np.ones((2, 2), np.int64))
    with pytest.raises(ArtefactError, match=r"has int64 of shape \(2, 2\)"):
        load_vector(tmp_path / "whole.npy")
    np.save(tmp_path / "nan.npy", np.full((2, 2), np.nan))
    with pytest.raises(NumericsError, match="holds inf or nan"):
        load_vector(tmp_path / "nan.npy")


def test_a_vector_of_another_text_encoder_is_refused(embedder: TorchTextEmbedder, demo_model: Path) -> None:
    vector = concept_vector(embedder, PAIRS, "gun")
    with pytest.raises(FingerprintMismatch, match="the concept vector of gun was made with text encoder"):
        vector.check(folder_embedder(demo_model))
    with pytest.raises(UsageError, match=r"has shape \(24, 32\), embeddings \(24, 256\)"):
        vector.added_to(np.zeros((24, 256), np.float32), 1.0)


@pytest.mark.parametrize("eta", [float("nan"), float("inf")])
def test_eta_is_finite(eta: float) -> None:
    vector = ConceptVector(np.ones((2, 3), np.float32), VectorMetadata(concept="gun"))
    with pytest.raises(UsageError, match=f"eta = {eta}: give a finite number"):
        vector.added_to(np.zeros((2, 3), np.float32), eta)
    assert vector.added_to(np.zeros((2, 3), np.float32), -2.0).tolist() == [[-2.0] * 3] * 2


def test_bad_pairs(embedder: TorchTextEmbedder) -> None:
    with pytest.raises(UsageError, match="2 prompts with the concept and 1 without"):
        paired(["a gun", "guns"], ["a picture"])
    for nothing in (lambda: paired([], []), lambda: concept_vector(embedder, [], "gun")):
        with pytest.raises(UsageError, match="no pair of prompts"):
            nothing()
    with pytest.raises(UsageError, match="both prompts of a pair are 'a gun'"):
        PromptPair("a gun", "a  gun ")
    with pytest.raises(UsageError, match="half empty"):
        PromptPair("a gun", " ")
    with pytest.raises(PromptTooLong):
        concept_vector(embedder, [PromptPair("gun " * 40, "picture")], "gun")
    with pytest.raises(UsageError, match="concept is blank"):
        template_pairs(" ")
    with pytest.raises(UsageError, match="no template 'mood': choose object or style"):
        template_pairs("gun", "mood")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="a concept vector of shape"):
        ConceptVector(np.ones(3, np.float32), VectorMetadata(concept="gun"))


def test_templates_add_the_concept_and_never_name_it_in_the_other() -> None:
    pairs = template_pairs(" a gun ")
    assert len(pairs) == len(SCENES) == len(set(SCENES))
    assert all(one.shown == f"{one.absent} with a gun" for one in pairs)
    (style,) = template_pairs("Van Gogh", "style", ["a photo of a street"])
    assert style == PromptPair("a photo of a street, in the style of Van Gogh", "a photo of a street")


def test_pairs_of_a_file(tmp_path: Path) -> None:
    file = tmp_path / "pairs.csv"
    file.write_text('sensitive prompt,normal prompt\n"a gun, on red",red\n a gun ,a picture\n')
    assert read_pairs(file) == (PromptPair("a gun, on red", "red"), PromptPair("a gun", "a picture"))
    file.write_text("prompt,case_number,prompt1\na gun,1,a picture\n")
    assert read_pairs(file, shown="prompt", absent="prompt1") == (PromptPair("a gun", "a picture"),)
    with pytest.raises(UsageError, match="has no column"):
        read_pairs(file)
    file.write_text("sensitive prompt,normal prompt\na gun,\n")
    with pytest.raises(UsageError, match="half empty"):
        read_pairs(file)
