"""Train the demo's ``CLIPTokenizer``: byte-level BPE with CLIP's ``</w>`` word ends, over every caption.

Every word of the captions becomes one token; anything else is spelt from bytes, so no text is out of vocabulary.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import CLIPTokenizer

from excise.demo.vocabulary import all_captions

MAX_LENGTH = 24


def train(folder: Path) -> CLIPTokenizer:
    """Train on all captions and write ``vocab.json``, ``merges.txt`` and the tokenizer's configuration."""
    bytes_ = sorted(pre_tokenizers.ByteLevel.alphabet())
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.normalizer = normalizers.Lowercase()
    bpe.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.BpeTrainer(vocab_size=4096, min_frequency=1, end_of_word_suffix="</w>", show_progress=False)
    bpe.train_from_iterator(all_captions(), trainer)
    merges = [tuple(pair) for pair in json.loads(bpe.to_str())["model"]["merges"]]
    tokens = bytes_ + [byte + "</w>" for byte in bytes_] + ["".join(pair) for pair in merges]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = {token: index for index, token in enumerate(dict.fromkeys(tokens))}
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(" ".join(pair) for pair in merges) + "\n")
    tokenizer = CLIPTokenizer(
        str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=MAX_LENGTH, pad_token="<|endoftext|>"
    )
    tokenizer.save_pretrained(folder)
    return tokenizer


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("demo/work"))
    arguments = parser.parse_args()
    tokenizer = train(arguments.work / "tokenizer")
    print(f"tokenizer: {len(tokenizer)} tokens", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
