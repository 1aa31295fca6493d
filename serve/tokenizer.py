"""CLIP's tokenizer from its files, by the ``tokenizers`` library alone.

The pipeline is that of transformers' ``CLIPTokenizerFast``: NFC, runs of white space to one space, lower case; a split
into English contractions, runs of letters, single digits and runs of anything else; bytes as printable characters;
byte-pair merges with ``</w>`` at the end of a word (Radford et al. 2021, §2.4; Sennrich et al. 2016); begin and end
tokens; padding to the length that the text encoder reads. Nothing is cut: a prompt that doesn't fit is an error.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE

from excise.errors import ModelError, PromptTooLong, UsageError

WORDS = r"""'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"""
#: merges that CLIP's tokenizer reads at most: its vocabulary of 49152 without the 256 bytes and 2 special tokens
MAX_MERGES = 49152 - 256 - 2
#: how much of a prompt an error message quotes
QUOTED = 60


class PromptTokenizer:
    """Prompts to padded token ids, for a diffusers ``tokenizer`` folder.

    They are padded to the folder's ``model_max_length``, or to ``max_length``, what the text encoder reads, if that is
    less; begin and end count. Raises ``ModelError`` if a file is missing or can't be used.
    """

    def __init__(self, folder: Path, *, max_length: int | None = None) -> None:
        folder = Path(folder)
        config = read_json(folder / "tokenizer_config.json")
        special = special_tokens(folder, config)
        limits = [value for value in (config.get("model_max_length"), max_length) if value is not None]
        limit = min(limits) if limits and all(isinstance(value, int) for value in limits) else None
        # transformers writes 10³⁰ for "no limit"
        if limit is None or not 2 <= limit < 2**31:
            raise ModelError(f"{folder}: model_max_length={config.get('model_max_length')!r} isn't a number of tokens")
        self.max_length = limit
        try:
            if (folder / "tokenizer.json").is_file():
                self._tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
            else:
                self._tokenizer = clip_tokenizer(folder, special)
            self._tokenizer.no_truncation()
            self._tokenizer.no_padding()
            self._tokenizer.add_special_tokens(list(special.values()))
        except ModelError:
            raise
        except Exception as error:  # the library raises bare Exceptions
            raise ModelError(f"the tokenizer in {folder} can't be read: {error}") from error
        self.bos_token_id, self.eos_token_id, self.pad_token_id = (
            self._id(folder, special[role]) for role in ("bos_token", "eos_token", "pad_token")
        )

    def _id(self, folder: Path, token: AddedToken) -> int:
        identity = self._tokenizer.token_to_id(token.content)
        if identity is None:
            raise ModelError(f"the tokenizer in {folder} has no token {token.content!r}")
        return int(identity)

    def tokens(self, prompt: str) -> list[int]:
        """Token ids of one prompt, begin and end included, neither padded nor checked for length.

        Raises ``UsageError`` if it isn't text that can be encoded.
        """
        try:
            return list(self._tokenizer.encode(prompt).ids)
        except (TypeError, UnicodeError) as error:
            raise UsageError(f"the prompt {prompt!r} isn't valid Unicode text") from error

    def encode(self, prompts: Sequence[str]) -> npt.NDArray[np.int64]:
        """Token ids, int64 with shape (n, max_length), padded at the end.

        Raises ``PromptTooLong`` for a prompt with more than ``max_length`` tokens, and ``UsageError`` for one that
        isn't text.
        """
        ids = np.full((len(prompts), self.max_length), self.pad_token_id, np.int64)
        for row, prompt in zip(ids, prompts, strict=True):
            tokens = self.tokens(prompt)
            if len(tokens) > self.max_length:
                quoted = prompt if len(prompt) <= QUOTED else prompt[:QUOTED] + "…"
                raise PromptTooLong(
                    f"the prompt {quoted!r} has {len(tokens)} tokens, this model reads {self.max_length}: shorten it"
                )
            row[: len(tokens)] = tokens
        return ids


def clip_tokenizer(folder: Path, special: Mapping[str, AddedToken]) -> Tokenizer:
    """The pipeline of ``CLIPTokenizerFast``, from ``vocab.json`` and ``merges.txt``."""
    vocabulary = read_json(folder / "vocab.json")
    merges = read_text(folder / "merges.txt").strip().split("\n")[1 : MAX_MERGES + 1]
    pairs = [tuple(line.split()) for line in merges]
    bos, eos = special["bos_token"].content, special["eos_token"].content
    for token in (bos, eos):
        if token not in vocabulary:
            raise ModelError(f"{folder / 'vocab.json'} has no token {token!r}")
    tokenizer = Tokenizer(
        BPE(
            vocab=vocabulary,
            merges=[(first, second) for first, second in pairs],
            continuing_subword_prefix="",
            end_of_word_suffix="</w>",
            fuse_unk=False,
            unk_token=special["unk_token"].content,
        )
    )
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.RobertaProcessing(
        (eos, vocabulary[eos]), (bos, vocabulary[bos]), add_prefix_space=False, trim_offsets=False
    )
    return tokenizer


def special_tokens(folder: Path, config: Mapping[str, Any]) -> dict[str, AddedToken]:
    """The special tokens by their roles.

    As transformers does: what ``added_tokens_decoder`` says about a token wins; a folder that was saved before it
    existed has its tokens in ``special_tokens_map.json``, which wins over ``tokenizer_config.json`` (SD 2's padding by
    "!").
    """
    roles: dict[str, Any] = {
        "bos_token": "<|startoftext|>",
        "eos_token": "<|endoftext|>",
        "unk_token": "<|endoftext|>",
        "pad_token": "<|endoftext|>",
    }
    sources = [config]
    described = config.get("added_tokens_decoder")
    if described is None and (folder / "special_tokens_map.json").is_file():
        sources.append(read_json(folder / "special_tokens_map.json"))
    for source in sources:
        roles.update({role: source[role] for role in roles if source.get(role) is not None})
    by_content = {}
    for token in (described or {}).values():
        if isinstance(token, dict) and "content" in token:
            by_content[token["content"]] = token
    result = {}
    for role, token in roles.items():
        content = token.get("content") if isinstance(token, dict) else token
        if not isinstance(content, str) or not content:
            raise ModelError(f"{folder}: {role}={token!r} isn't a token")
        options = by_content.get(content, token if isinstance(token, dict) else {})
        # a bare string becomes a token that is matched in the text as it was typed
        result[role] = AddedToken(
            content,
            special=True,
            **{
                option: bool(options.get(option, False)) for option in ("single_word", "lstrip", "rstrip", "normalized")
            },
        )
    return result


def read_text(file: Path) -> str:
    """A file's text. Raises ``ModelError`` if it can't be read."""
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise ModelError(f"the tokenizer's {file} can't be read: {error}") from error


def read_json(file: Path) -> dict[str, Any]:
    """A file's JSON object. Raises ``ModelError`` if it can't be read or is something else."""
    try:
        value = json.loads(read_text(file))
    except ValueError as error:
        raise ModelError(f"the tokenizer's {file} isn't JSON: {error}") from error
    if not isinstance(value, dict):
        raise ModelError(f"the tokenizer's {file} isn't a JSON object")
    return value
