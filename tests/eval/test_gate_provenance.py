"""The gate's rules on provenance, on real folders: what a manifest can show, and what only the images can."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from excise.edit.erase import erase
from excise.edit.recipe import resolve
from excise.editfile import Edit, save_edit
from excise.errors import ArtefactError
from excise.eval.evaluation import Evaluation, ProtocolRecord, RuntimeRecord
from excise.eval.gate import decide
from excise.eval.policy import load_policy
from excise.eval.runtimes import parse_runtime, provenance
from excise.export.onnx_export import export_pipeline
from excise.export.patch import patch
from excise.manifest import NAME, hash_file
from excise.onnx_metadata import EDIT_ID, write_metadata

UNET, DATA = "unet/model.onnx", "unet/edit.onnx_data"
INTACT, SAME = "provenance intact", "same edit as the reference"


def made(model: Path, erased: str) -> Edit:
    recipe = resolve(None, None, {"erase": [erased], "to": ["sunflower"], "keep": ["cat"]})
    return erase(model, recipe, certificate=False)


@pytest.fixture(scope="module")
def edits(tiny_model: Path) -> tuple[Edit, Edit]:
    """The right edit and another."""
    return made(tiny_model, "gun"), made(tiny_model, "owl")


@pytest.fixture(scope="module")
def right(tiny_model: Path, edits: tuple[Edit, Edit], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("right") / "onnx"
    export_pipeline(tiny_model, out, edit=edits[0])
    return out


@pytest.fixture(scope="module")
def other(right: Path, edits: tuple[Edit, Edit], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The right folder with the other edit in it, patched as it should be."""
    out = tmp_path_factory.mktemp("other") / "onnx"
    patch(right, edits[1], out=out, link=False)
    return out


@pytest.fixture(scope="module")
def edit_file(edits: tuple[Edit, Edit], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("edit") / "gun.safetensors"
    save_edit(path, edits[0])
    return path


def judged(folder: Path, tiny_model: Path, edit_file: Path) -> dict[str, tuple[str, str]]:
    """Rule → status and sentence, of the demo policy's rules that look at no image."""
    specs = [
        parse_runtime(f"reference=torch:{tiny_model}?edit={edit_file}"),
        parse_runtime(f"served=onnx:{folder}"),
    ]
    runtimes = [RuntimeRecord(name=s.name, source=str(s), kind=s.kind, provenance=provenance(s)) for s in specs]
    record = ProtocolRecord(
        name="demo-weapons", version=1, title="", settings={}, reference="reference", runtimes=tuple(runtimes), cases=()
    )
    bundled = load_policy("demo")
    policy = bundled.model_copy(update={"rules": tuple(r for r in bundled.rules if r.name in (INTACT, SAME))})
    result = decide(Evaluation(protocols=(record,)), policy)
    assert {check.runtime for check in result.checks} == {"served"}
    return {check.rule: (check.status, check.sentence) for check in result.checks}


def rewritten(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    document = json.loads((folder / NAME).read_text())
    change(document)
    (folder / NAME).write_text(json.dumps(document))


def rehashed(folder: Path, *files: str) -> None:
    """The manifest made to agree with files that were exchanged."""

    def change(document: dict[str, Any]) -> None:
        for file in files:
            entry = {"size": (folder / file).stat().st_size, "sha256": hash_file(folder / file)}
            document["files"][file].update(entry)

    rewritten(folder, change)


def test_a_right_artefact_passes(right: Path, tiny_model: Path, edit_file: Path) -> None:
    found = judged(right, tiny_model, edit_file)
    assert {rule: status for rule, (status, _) in found.items()} == {INTACT: "passed", SAME: "passed"}


def flipped(folder: Path, other: Path) -> None:
    with (folder / DATA).open("r+b") as stream:
        stream.seek(-1, 2)
        last = stream.read(1)[0]
        stream.seek(-1, 2)
        stream.write(bytes([last ^ 1]))


def cut(folder: Path, other: Path) -> None:
    file = folder / "tokenizer" / "merges.txt"
    os.truncate(file, file.stat().st_size - 1)


def relabelled(folder: Path, other: Path) -> None:
    """The graph names another edit, and the manifest agrees with the graph's bytes, not with its name."""
    write_metadata(folder / UNET, folder / "unet" / "renamed", {EDIT_ID: "other"})
    (folder / "unet" / "renamed").replace(folder / UNET)
    rehashed(folder, UNET)


FAULTS: dict[str, tuple[Callable[[Path, Path], object], dict[str, str]]] = {
    "one bit of the edited weights": (flipped, {INTACT: f"{DATA} was altered: its SHA-256 isn't the manifest's"}),
    "a byte short": (cut, {INTACT: "tokenizer/merges.txt was altered: "}),
    "a file gone": (
        lambda folder, other: (folder / "tokenizer" / "vocab.json").unlink(),
        {INTACT: "tokenizer/vocab.json is missing"},
    ),
    "a file too many": (
        lambda folder, other: (folder / "unet" / "model.engine").write_bytes(b"x"),
        {INTACT: "unet/model.engine is not in the manifest"},
    ),
    "weights of another edit": (
        lambda folder, other: shutil.copy(other / DATA, folder / DATA),
        {INTACT: f"{DATA} was altered"},
    ),
    "manifest of another edit": (
        lambda folder, other: shutil.copy(other / NAME, folder / NAME),
        {INTACT: f"{DATA} was altered"},
    ),
    "a manifest that names another edit": (
        lambda folder, other: rewritten(folder, lambda document: document["edit"].update(id="f" * 64)),
        {INTACT: f"excise.json names the edit {'f' * 64}, and the ONNX files carry "},
    ),
    "a graph that names another edit": (
        relabelled,
        {INTACT: ", and the ONNX files carry other", SAME: "carries the edit other, and reference has "},
    ),
    "a manifest without an edit": (
        lambda folder, other: rewritten(folder, lambda document: document.update(edit=None)),
        {INTACT: "excise.json names the edit None, and the ONNX files carry "},
    ),
    "no manifest": (
        lambda folder, other: (folder / NAME).unlink(),
        {INTACT: "has no manifest to hold its files against"},
    ),
    "patched to another edit": (
        lambda folder, other: shutil.rmtree(folder) or shutil.copytree(other, folder),
        {SAME: ", and reference has "},
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_wrong_one_fails_by_the_rule_that_sees_it(
    fault: str, right: Path, other: Path, tiny_model: Path, edit_file: Path, tmp_path: Path
) -> None:
    inflict, expected = FAULTS[fault]
    folder = Path(shutil.copytree(right, tmp_path / "served"))
    inflict(folder, other)
    found = judged(folder, tiny_model, edit_file)
    assert {rule for rule, (status, _) in found.items() if status == "failed"} == set(expected)
    for rule, sentence in expected.items():
        assert sentence in found[rule][1]


def test_a_forged_manifest_passes_which_is_why_images_are_judged_too(
    right: Path, other: Path, tiny_model: Path, edit_file: Path, tmp_path: Path
) -> None:
    """Another edit's weights under the right names and hashes: a manifest is no signature."""
    folder = Path(shutil.copytree(right, tmp_path / "served"))
    shutil.copy(other / DATA, folder / DATA)
    rehashed(folder, DATA)
    assert hash_file(folder / DATA) != hash_file(right / DATA)
    found = judged(folder, tiny_model, edit_file)
    assert {status for status, _ in found.values()} == {"passed"}


@pytest.mark.parametrize("content", [b"", b"{}", b"[" * 9000])
def test_a_manifest_that_is_none_ends_the_run(
    content: bytes, right: Path, tiny_model: Path, edit_file: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(right, tmp_path / "served"))
    (folder / NAME).write_bytes(content)
    with pytest.raises(ArtefactError, match=r"excise\.json"):
        judged(folder, tiny_model, edit_file)
