"""A protocol's prompts from a data set of the Hugging Face hub, kept in its cache.

The one thing that an evaluation downloads, and only for a protocol that names it: no bundled one does. A commit is
pinned, so a file that is in the cache is taken from there without asking the hub.
"""

from __future__ import annotations

from pathlib import Path

from excise.errors import MissingExtra, UsageError
from excise.eval.protocol_schema import HubPrompts
from excise.printable import printable


def hub_file(protocol: str, prompts: HubPrompts) -> Path:
    """The prompts' file in the hub's cache, downloaded where it isn't there.

    Raises:
        UsageError: the data set, its commit or the file isn't there, needs a token, or can't be reached.
        MissingExtra: huggingface_hub isn't installed.
    """
    try:
        from huggingface_hub import errors, hf_hub_download
    except ImportError as error:
        raise MissingExtra("huggingface_hub", "eval") from error
    named = f"{protocol} takes {prompts.file} of the hub's data set {prompts.dataset} at {prompts.revision[:12]}"
    remedy = f"or get the file yourself and give --prompts {Path(prompts.file).name}"
    try:
        return Path(hf_hub_download(prompts.dataset, prompts.file, repo_type="dataset", revision=prompts.revision))
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as error:
        offline = "which isn't in the cache, and the hub can't be reached from here"
        raise UsageError(f"{named}, {offline}: run it once where it can, {remedy}") from error
    except (OSError, ValueError) as error:  # the hub's errors are both
        raise UsageError(f"{named}, {_refused(error)}: check the protocol's prompts, {remedy}") from error


def _refused(error: Exception) -> str:
    """What the hub said, in words."""
    from huggingface_hub import errors

    kinds = (
        (errors.GatedRepoError, "which needs a token that may read it (HF_TOKEN)"),
        (errors.RepositoryNotFoundError, "which the hub hasn't, or not for you"),
        (errors.RevisionNotFoundError, "a commit that the data set hasn't"),
        (errors.EntryNotFoundError, "a file that isn't in it"),
    )
    said = printable(" ".join(str(error).split()))[:120]
    return next((why for kind, why in kinds if isinstance(error, kind)), f"which can't be fetched ({said})")
