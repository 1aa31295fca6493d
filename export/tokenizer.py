"""Write ``tokenizer.json`` beside a CLIP tokenizer's slow files, so that serving needs no transformers.

transformers' slow ``CLIPTokenizer`` cleans its text with ftfy where that is installed and otherwise with BERT's rules
(CJK characters set apart, control characters dropped); its fast one does neither. So the fast one is tried as it is and
with BERT's rules, and written only if it gives the ids of the pipeline's own tokenizer.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from excise.export.quiet import quiet

#: Prompts that tokenizer.json must turn into the same ids as the pipeline's own tokenizer.
CHECKS = (
    "",
    " ",
    "a photo of a dog",
    "UPPER lower, punctuation!? (brackets) it's 1234 don't",
    "naïve café, e\u0301, ﬁ, İstanbul, 東京の夜, Привет, مرحبا",
    "a 🔫 and a 🧑🏽\u200d🚀 and ❤️",
    "  many\tspaces \n and\u00a0lines\u3000and \u0000 controls\u0007 ",
    "an <|endoftext|> in the middle",
    "word " * 200,
)


def write_fast_tokenizer(folder: Path, tokenizer: Any) -> bool:
    """Write ``folder/tokenizer.json``, without padding or truncation, if its ids are right on ``CHECKS``.

    Args:
        folder: Holds ``vocab.json`` and ``merges.txt``.
        tokenizer: The pipeline's own.

    Returns:
        Whether there is a ``tokenizer.json`` now.
    """
    target = folder / "tokenizer.json"
    if target.is_file():
        return True
    with quiet():
        from tokenizers import normalizers
        from transformers import CLIPTokenizerFast

        try:
            fast = CLIPTokenizerFast.from_pretrained(str(folder), local_files_only=True)
        except Exception:  # tokenizers raises the base class for merges that don't fit the vocabulary
            return False
        plain = fast.backend_tokenizer.normalizer
        bert = normalizers.BertNormalizer(
            clean_text=True, handle_chinese_chars=True, strip_accents=False, lowercase=False
        )
        for normalizer in (plain, normalizers.Sequence([bert, plain])):
            fast.backend_tokenizer.normalizer = normalizer
            if all(_ids(fast, prompt) == _ids(tokenizer, prompt) for prompt in CHECKS):
                fast.backend_tokenizer.no_padding()
                fast.backend_tokenizer.no_truncation()
                fast.backend_tokenizer.save(str(target))
                return True
    return False


def _ids(tokenizer: Any, prompt: str) -> list[int]:
    """A prompt's ids, padded and cut as a pipeline does, and uncut."""
    cut = tokenizer(prompt, padding="max_length", truncation=True, max_length=tokenizer.model_max_length).input_ids
    return [*cut, *tokenizer(prompt).input_ids]
