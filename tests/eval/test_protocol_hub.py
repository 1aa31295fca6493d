"""Prompts of a data set of the hub, from a cache that is made here: nothing is asked of any server."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from excise.errors import UsageError
from excise.eval.protocol_file import ProtocolFile, load_protocol

huggingface_hub = pytest.importorskip("huggingface_hub")
constants = pytest.importorskip("huggingface_hub.constants")
errors = pytest.importorskip("huggingface_hub.errors")

COMMIT = "0123456789abcdef" * 2 + "01234567"
OWN = f"""\
format: 1
name: mills
version: 1
title: Mills erased
prompts:
  source: hub
  dataset: windmills/prompts
  revision: {COMMIT}
  file: data/mills.csv
  columns: {{label: class}}
groups:
  erased: [mill]
metrics:
  - {{name: weights_changed}}
"""


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The hub's cache, empty, and no network."""
    folder = tmp_path / "hub"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return folder


def protocol(folder: Path, text: str = OWN) -> ProtocolFile:
    (folder / "mills.yaml").write_text(text)
    return load_protocol(folder / "mills.yaml")


def test_a_commit_that_is_in_the_cache_is_read_from_there(tmp_path: Path, cache: Path) -> None:
    snapshot = cache / "datasets--windmills--prompts" / "snapshots" / COMMIT / "data"
    snapshot.mkdir(parents=True)
    (snapshot / "mills.csv").write_text("prompt,class\na mill,mill\na bell,bell\n")
    own = protocol(tmp_path)
    assert [(case.prompt, case.group) for case in own.cases()] == [("a mill", "erased"), ("a bell", "kept")]
    # Two commits are two sets of prompts, and two reports say so.
    settings = own.settings()["prompts"]
    assert (settings["source"], settings["dataset"], settings["revision"]) == ("hub", "windmills/prompts", COMMIT)


def test_a_file_that_is_given_comes_first(tmp_path: Path) -> None:
    (tmp_path / "mine.csv").write_text("prompt,class\na mill,mill\n")
    assert len(protocol(tmp_path).cases(tmp_path / "mine.csv")) == 1


def test_without_a_network_the_remedy_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError) as refusal:
        protocol(tmp_path).cases()
    assert str(refusal.value) == (
        "mills takes data/mills.csv of the hub's data set windmills/prompts at 0123456789ab, which isn't in the cache, "
        "and the hub can't be reached from here: run it once where it can, or get the file yourself and give "
        "--prompts mills.csv"
    )


def response(status: int) -> Any:
    import requests

    made = requests.Response()
    made.status_code = status
    return made


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        ("GatedRepoError", r"which needs a token that may read it \(HF_TOKEN\)"),
        ("RepositoryNotFoundError", "which the hub hasn't, or not for you"),
        ("RevisionNotFoundError", "a commit that the data set hasn't"),
        ("EntryNotFoundError", "a file that isn't in it"),
        ("HfHubHTTPError", r"which can't be fetched \(500 it rains\)"),
    ],
)
def test_what_the_hub_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, why: str) -> None:
    asked: list[tuple[Any, ...]] = []

    def refuse(*arguments: Any, **options: Any) -> str:
        asked.append((*arguments, options))
        raise getattr(errors, kind)("500\nit rains", response=response(500))

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", refuse)
    with pytest.raises(UsageError, match=f"{why}: check the protocol's prompts, or get the file yourself"):
        protocol(tmp_path).cases()
    assert asked == [("windmills/prompts", "data/mills.csv", {"repo_type": "dataset", "revision": COMMIT})]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (COMMIT, "main", ":8: prompts.revision: 'main': give a commit of the data set, 40 digits from 0 to f"),
        ("windmills/prompts", "../prompts", ":7: prompts.dataset: '../prompts': give the data set's name"),
        ("data/mills.csv", "../../secret", ":9: prompts.file: '../../secret': give the file's path in the data set"),
        ("data/mills.csv", "/etc/passwd", ":9: prompts.file: '/etc/passwd': give the file's path in the data set"),
        ("  dataset: windmills/prompts\n", "", ":6: prompts.dataset: is missing: give the data set's name"),
        ("label: class", "label: class, width: w", ":10: prompts.columns: an image has two sides: name both"),
        ("  erased: [mill]", "  erased: [mill]\n  all: kept", ":12: groups: give either all or erased"),
        ("{label: class}", "{}", ":12: groups.erased: goes by labels: name their column"),
    ],
)
def test_mistakes_are_found_by_line_and_field(tmp_path: Path, old: str, new: str, message: str) -> None:
    assert old in OWN
    with pytest.raises(UsageError) as refusal:
        protocol(tmp_path, OWN.replace(old, new, 1))
    assert message in str(refusal.value)
