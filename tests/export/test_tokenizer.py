"""tokenizer.json gives the ids of the pipeline's own tokenizer, or isn't written."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from excise.export.tokenizer import CHECKS, write_fast_tokenizer


@pytest.fixture
def folder(tiny_model: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_model / "tokenizer", tmp_path / "tokenizer"))


@pytest.mark.parametrize(
    "prompt", [*CHECKS, "𝔘𝔫𝔦𝔠𝔬𝔡𝔢 ½ ™ ﬀ", "한국어 텍스트", "שלום", "\ufeffbom\u200b", "ǅ ẞ", "'s 't 12 a1b2"]
)
def test_its_ids_are_the_pipelines(folder: Path, prompt: str) -> None:
    from tokenizers import Tokenizer
    from transformers import CLIPTokenizer

    slow = CLIPTokenizer.from_pretrained(folder)
    slow.deprecation_warnings["sequence-length-is-longer-than-the-specified-maximum"] = True
    assert write_fast_tokenizer(folder, slow)
    assert Tokenizer.from_file(str(folder / "tokenizer.json")).encode(prompt).ids == slow(prompt).input_ids


def test_it_is_not_written_if_the_ids_differ(folder: Path) -> None:
    from transformers import CLIPTokenizer

    slow = CLIPTokenizer.from_pretrained(folder)
    slow.do_lower_case = False
    slow.nlp = None
    slow.fix_text = lambda text: text.replace("dog", "cat")
    assert not write_fast_tokenizer(folder, slow)
    assert not (folder / "tokenizer.json").exists()


def test_merges_that_dont_fit_the_vocabulary_are_left_to_the_pipelines_own(folder: Path) -> None:
    from transformers import CLIPTokenizer

    with (folder / "merges.txt").open("a") as stream:
        stream.write("nowhere x</w>\n")
    slow = CLIPTokenizer.from_pretrained(folder)
    (folder / "tokenizer.json").unlink(missing_ok=True)
    assert not write_fast_tokenizer(folder, slow)
    assert not (folder / "tokenizer.json").exists()
