"""Token ids are those of transformers' tokenizers, and nothing is cut."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from excise.errors import ModelError, PromptTooLong, UsageError
from excise.serve.tokenizer import PromptTokenizer

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script`:FutureWarning")

PROMPTS = [
    "",
    " ",
    "a gun",
    "A photo of a GUN!",
    "don't it's we'll THEY'RE I'd 'S",
    "café cafe\u0301 e\u0301\u0323",
    "ÀÉ Straße İstanbul ſ",
    "🔫",
    "🧑🏽 🙂🙂",
    "a\t\nb \u00a0c\u2003d\u3000e\u2028f\r\n",
    "  before and after  ",
    "12345 3.14 ½ ²",
    "hello, world!!! (ok) [x] #tag @you",
    "a!b ! !!",
    "snake_case ﬁ",
    "<|endoftext|> x",
    "<|STARTOFTEXT|>x<|startoftext|>y",
    "مرحبا",
    "हिन्दी",
    "한국어",
    "long " * 100,
]
#: CLIPTokenizer without ftfy strips control characters, splits ideographs and lowers a final sigma, unlike the fast one
FAST_ONLY = ["👩‍🚀 🏳️‍🌈", "你好 世界", "日本語テキスト", "a\x00b", "a\u200bb", "\ufeffa", "a\x85b", "ΣΑΣ"]


@pytest.fixture(params=["as saved", "padded by !", "padded by ! (legacy)", "tokenizer.json"])
def folder(request: pytest.FixtureRequest, demo_model: Path, tmp_path: Path) -> Path:
    """The demo model's tokenizer in the layouts that are in the wild."""
    source, folder = demo_model / "tokenizer", tmp_path / "tokenizer"
    if request.param == "tokenizer.json":
        from transformers import CLIPTokenizerFast

        CLIPTokenizerFast.from_pretrained(source).save_pretrained(folder)
        assert (folder / "tokenizer.json").is_file()
        return folder
    shutil.copytree(source, folder)
    if request.param == "padded by !":
        vocabulary = json.loads((folder / "vocab.json").read_text())
        token = {"content": "!", "lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
        rewrite(folder / "tokenizer_config.json", pad_token="!", added=(vocabulary["!"], token))
    elif request.param == "padded by ! (legacy)":
        rewrite(folder / "tokenizer_config.json", drop="added_tokens_decoder")
        rewrite(folder / "special_tokens_map.json", pad_token="!")
    return folder


def rewrite(file: Path, *, added: tuple[int, dict[str, Any]] | None = None, drop: str = "", **values: Any) -> None:
    """Changes values of a JSON file."""
    config = {**json.loads(file.read_text()), **values}
    config.pop(drop, None)
    if added is not None:
        config["added_tokens_decoder"][str(added[0])] = {**added[1], "special": True}
    file.write_text(json.dumps(config))


@pytest.mark.parametrize("kind", ["CLIPTokenizer", "CLIPTokenizerFast"])
def test_same_ids(folder: Path, kind: str) -> None:
    import transformers

    theirs = getattr(transformers, kind).from_pretrained(folder)
    ours = PromptTokenizer(folder)
    assert ours.max_length == theirs.model_max_length == 24
    special = (ours.bos_token_id, ours.eos_token_id, ours.pad_token_id)
    assert special == (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id)
    for prompt in PROMPTS + (FAST_ONLY if kind == "CLIPTokenizerFast" else []):
        ids = theirs(prompt).input_ids
        assert ours.tokens(prompt) == ids, prompt
        if len(ids) <= 24:
            padded = theirs(prompt, padding="max_length", max_length=24, return_tensors="np").input_ids
            np.testing.assert_array_equal(ours.encode([prompt]), padded)


def test_shape(demo_model: Path) -> None:
    tokenizer = PromptTokenizer(demo_model / "tokenizer")
    ids = tokenizer.encode(["a gun", ""])
    assert ids.shape == (2, 24)
    assert ids.dtype == np.int64
    assert (ids[1] == [tokenizer.bos_token_id] + [tokenizer.eos_token_id] * 23).all()
    assert tokenizer.encode([]).shape == (0, 24)


def test_too_long(demo_model: Path) -> None:
    tokenizer = PromptTokenizer(demo_model / "tokenizer")
    assert tokenizer.encode(["1 " * 22])[0, -1] == tokenizer.eos_token_id
    with pytest.raises(PromptTooLong, match="has 25 tokens, this model reads 24: shorten it") as error:
        tokenizer.encode(["a gun", "1 " * 23])
    assert "1 1 1" in str(error.value)
    with pytest.raises(PromptTooLong, match="has 5002 tokens, this model reads 24") as error:
        tokenizer.encode(["1\n" * 5000])
    assert len(str(error.value)) < 250
    assert "\n" not in str(error.value)
    with pytest.raises(PromptTooLong, match="has 12 tokens, this model reads 10"):
        PromptTokenizer(demo_model / "tokenizer", max_length=10).encode(["1 " * 10])
    assert PromptTokenizer(demo_model / "tokenizer", max_length=77).encode(["a gun"]).shape == (1, 24)


def test_not_text(demo_model: Path) -> None:
    tokenizer = PromptTokenizer(demo_model / "tokenizer")
    for prompt in ("\ud800", None, 3):
        with pytest.raises(UsageError, match="Unicode"):
            tokenizer.encode([prompt])  # type: ignore[list-item]


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("tokenizer_config.json", None, "tokenizer_config.json can't be read"),
        ("vocab.json", None, "vocab.json can't be read"),
        ("merges.txt", None, "merges.txt can't be read"),
        ("vocab.json", "{", "vocab.json isn't JSON"),
        ("vocab.json", "[]", "isn't a JSON object"),
        ("vocab.json", "{}", "has no token"),
        ("merges.txt", "#version: 0.2\na b c\n", "can't be read"),
        ("merges.txt", "#version: 0.2\nqqq zzz\n", "can't be read"),
        ("tokenizer_config.json", "{}", "model_max_length=None"),
        (
            "tokenizer_config.json",
            '{"model_max_length": 24, "pad_token": 3, "added_tokens_decoder": {}}',
            "pad_token=3",
        ),
        ("tokenizer.json", "{}", "can't be read"),
    ],
)
def test_broken_files(demo_model: Path, tmp_path: Path, file: str, content: str | None, message: str) -> None:
    folder = tmp_path / "tokenizer"
    shutil.copytree(demo_model / "tokenizer", folder)
    (folder / file).unlink(missing_ok=True)
    if content is not None:
        (folder / file).write_text(content)
    with pytest.raises(ModelError, match=message):
        PromptTokenizer(folder)
