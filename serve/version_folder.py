"""One version of the pipeline's model in a Triton repository.

    N/model.py       what Triton's Python backend imports
    N/onnx/          the export, whole: hard links, or copies across disks
    N/policy.json    which tenant may choose which edit, if there is a policy
    N/canary.json    what the model makes of a few fixed requests, if it was recorded
    N/excise.json    the manifest of all of these

A network of its own has ``N/model.onnx`` with its data files or ``N/model.plan``, and a manifest.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

from excise.enginefile import ENGINE, check_engine, read_engine
from excise.errors import ArtefactError, UsageError
from excise.manifest import NAME, Manifest, hash_file, read_manifest, write_manifest
from excise.onnx_metadata import read_edit_id
from excise.output import PARTIAL, hard_linked
from excise.serve.edit_policy import EditPolicy
from excise.serve.onnx_signature import Signature, read_signature
from excise.serve.repository_record import VersionEntry
from excise.serve.triton_options import NETWORKS, Backend

ONNX, POLICY, CANARY, MODEL = "onnx", "policy.json", "canary.json", "model.py"
KIND, NETWORK_KIND = "triton-version", "triton-network"

#: Given the exported folder and the version's, writes ``canary.json`` (and what it needs beside) into the latter.
Recorder = Callable[[Path, Path], object]

_MODEL = '''"""Triton loads the pipeline from here; what it runs lies in onnx."""
from excise.serve.triton_model import TritonPythonModel  # noqa: F401
'''


def check_export(folder: Path, manifest: Manifest, *, with_base: bool) -> None:
    """Raise unless an export can be served, and its unedited model only where that is wanted.

    Raises:
        UsageError: It serves the unedited model without ``with_base``, or is no Stable Diffusion 1 or 2.
        ArtefactError: A network is missing, or carries another edit than the manifest says.
    """
    others = {path.parent.name for path in folder.glob("*/model.onnx")} - {*NETWORKS, "vae_encoder"}
    if missing := [name for name in NETWORKS if not (folder / name / "model.onnx").is_file()]:
        raise ArtefactError(f"{folder} has no {missing[0]}/model.onnx: name a folder that excise export wrote")
    if others:
        raise UsageError(f"{folder} has {sorted(others)[0]}: a repository serves Stable Diffusion 1 and 2")
    carried = next(
        filter(None, (read_edit_id(folder / part / "model.onnx") for part in ("unet", "text_encoder"))), None
    )
    if carried != (manifest.edit.id if manifest.edit is not None else None):
        raise ArtefactError(f"{folder} carries edit {carried}, and its manifest says another: export it again")
    if with_base:
        return
    if None in manifest.bank:
        raise UsageError(f"{folder} is a bank from which requests may choose the unedited model: give --with-base")
    if manifest.edit is None and not manifest.bank:
        raise UsageError(f"{folder} carries no edit: give --with-base to serve the unedited model")


def take_export(folder: Path, target: Path, *, link: bool, like: Path | None = None) -> Manifest:
    """Fill the new folder ``target`` with the files that an export's manifest names; its manifest is returned.

    Files equal to those of ``like``, another export, are links to those, wherever ``folder`` lies.
    """
    manifest = read_manifest(folder)
    held = read_manifest(like).files if like is not None else {}
    target.mkdir()
    for path, entry in manifest.files.items():
        place = target / path
        place.parent.mkdir(parents=True, exist_ok=True)
        same = like is not None and held.get(path) == entry and (like / path).is_file()
        link_file((like if same and like is not None else folder) / path, place, link=link)
    link_file(folder / NAME, target / NAME, link=link)
    return manifest


def link_file(source: Path, target: Path, *, link: bool = True) -> None:
    """Make ``target`` another name of a file, or a copy where that can't be."""
    try:
        source = source.resolve(strict=True)  # what a symbolic link points to, not the link
        if not (link and hard_linked(source, target)):
            shutil.copy2(source, target)
    except FileNotFoundError as error:
        raise ArtefactError(f"{source} is missing, and the manifest lists it: export the model again") from error


def finish_version(
    folder: Path, names: dict[str, str | None], *, policy: EditPolicy | None, canary: Recorder | None
) -> VersionEntry:
    """Write what lies beside ``onnx`` in a version's folder, the manifest last."""
    exported = read_manifest(folder / ONNX)
    (folder / MODEL).write_text(_MODEL, encoding="utf-8")
    if policy is not None:
        (folder / POLICY).write_text(policy.to_json(), encoding="utf-8")
    if canary is not None:
        canary(folder / ONNX, folder)
    write_manifest(
        folder,
        kind=KIND,
        base=exported.base,
        edit=exported.edit,
        bank=exported.bank,
        tools=exported.tools,
        known={f"{ONNX}/{path}": entry for path, entry in exported.files.items()},
    )
    edit = exported.edit
    rows = [row.summary if row is not None else "the base" for row in exported.bank]
    return VersionEntry(
        edit=edit.id if edit is not None else None,
        edits=names,
        summary=f"a bank of {len(rows)}: {'; '.join(rows)}" if rows else edit.summary if edit else "no edit",
        manifest=hash_file(folder / NAME),
        canary=(folder / CANARY).is_file(),
    )


def network_signature(onnx: Path, name: str, backend: Backend) -> Signature:
    """What a network takes and gives: of its ONNX file, or of its engine, which must be the present edit's.

    Raises:
        ArtefactError: The file is missing or damaged, or the engine is stale or altered.
        UsageError: The engine is one that Triton's TensorRT backend can't load.
    """
    if backend == "onnxruntime":
        return read_signature(onnx / name / "model.onnx")
    engine = onnx / name / ENGINE
    entry = read_engine(engine)
    if entry.library != "tensorrt":
        raise UsageError(
            f"{engine} is TensorRT-RTX's, which Triton doesn't load: build it with excise engines ONNX_DIR "
            "--for-triton --out ENGINES"
        )
    if problems := check_engine(engine):
        raise ArtefactError(problems[0])
    return Signature(dict(entry.inputs), dict(entry.outputs))


def write_network(onnx: Path, name: str, backend: Backend, folder: Path) -> None:
    """Fill the new folder ``folder`` with a network's version: links into the pipeline's, and a manifest."""
    exported = read_manifest(onnx)
    folder.mkdir(parents=True)
    own = {
        path.removeprefix(f"{name}/"): entry for path, entry in exported.files.items() if path.startswith(f"{name}/")
    }
    if backend == "onnxruntime":
        base = (exported.base_weights or "").removeprefix(f"{name}/")
        left = {"config.json", base, ENGINE, f"{ENGINE}.json"}
        taken = {path: path for path in own if path not in left}
    else:
        taken = {ENGINE: "model.plan"}
    for path, called in taken.items():
        (folder / called).parent.mkdir(parents=True, exist_ok=True)
        link_file(onnx / name / path, folder / called)
    write_manifest(
        folder,
        kind=NETWORK_KIND,
        base=exported.base,
        edit=exported.edit,
        bank=exported.bank,
        tools=exported.tools,
        known={called: own[path] for path, called in taken.items() if path in own},
    )


def free_number(model: Path, recorded: int) -> int:
    """A version number that no folder of ``model`` has or had."""
    there = [int(path.name) for path in model.iterdir() if path.name.isdecimal()]
    return max([recorded, *there]) + 1


def discard(folder: Path) -> None:
    """Remove a version's folder in two steps, so that a half-removed one has no version's name."""
    dying = folder.with_name(f"{PARTIAL}removed-{folder.name}")
    shutil.rmtree(dying, ignore_errors=True)
    os.rename(folder, dying)
    shutil.rmtree(dying)
