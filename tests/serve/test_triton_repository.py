"""A repository is built, promoted and rolled back, and is whole whenever it is killed."""

from __future__ import annotations

import json
import os
import shutil
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from excise.cli_inspect_repository import inspect_repository
from excise.editfile import Edit
from excise.enginefile import EngineEntry, entry_path, file_entry
from excise.errors import ArtefactError, OutputError, UsageError
from excise.export.engine_pipeline import record_engines
from excise.export.patch import patch
from excise.export.text_edit_folders import bank_folder
from excise.export.vector_timestep import vector_timestep_folder
from excise.manifest import NAME, BaseEntry, hash_file, read_manifest, verify, write_manifest
from excise.onnx_metadata import read_edit_id
from excise.output import PARTIAL
from excise.serve.edit_policy import EditPolicy
from excise.serve.onnx_signature import read_signature
from excise.serve.pbtxt import Message, parse, write
from excise.serve.repository_change import locked
from excise.serve.repository_check import check
from excise.serve.repository_record import (
    CONFIG,
    COPY,
    Record,
    parameter,
    read_config_text,
    read_copy,
    read_record,
    served_versions,
)
from excise.serve.triton_control import TritonServer
from excise.serve.triton_options import TritonOptions
from excise.serve.triton_repository import build, promote, rollback

NETWORKS = ("text_encoder", "unet", "vae_decoder")
ONNX_RUNTIME = TritonOptions(backend="onnxruntime")


def config(repository: Path, model: str = "excise") -> Message:
    return parse((repository / model / CONFIG).read_text(), CONFIG)


def patched(edit: Edit) -> Callable[[Path, Path], object]:
    """What makes a version with another edit."""
    return lambda present, out: patch(present, edit, out=out)


def canary(onnx: Path, folder: Path) -> None:
    """A stand-in for a recording."""
    (folder / "canary.json").write_text(json.dumps({"edit": read_edit_id(onnx / "unet/model.onnx")}))


def contents(folder: Path) -> dict[str, str]:
    return {path.relative_to(folder).as_posix(): hash_file(path) for path in folder.rglob("*") if path.is_file()}


def sound(repository: Path) -> None:
    assert check(repository).problems == ()


@pytest.fixture(scope="module")
def plain(exported: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The export without an edit, with a manifest. Not to be changed by tests."""
    folder = Path(shutil.copytree(exported, tmp_path_factory.mktemp("plain") / "onnx"))
    write_manifest(folder, kind="onnx-pipeline", base=BaseEntry(name="tiny", pipeline="StableDiffusionPipeline"))
    return folder


@pytest.fixture(scope="module")
def bank(plain: Path, edits: tuple[Edit, Edit], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bank of both edits. Not to be changed by tests."""
    out = tmp_path_factory.mktemp("bank") / "onnx"
    bank_folder(plain, out, edits, link=False)
    return out


@pytest.fixture(scope="module")
def base_bank(plain: Path, edits: tuple[Edit, Edit], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bank of the first edit and the base. Not to be changed by tests."""
    out = tmp_path_factory.mktemp("base-bank") / "onnx"
    bank_folder(plain, out, edits[:1], with_base=True, link=False)
    return out


@pytest.fixture
def repository(versions: tuple[Path, Path], tmp_path: Path) -> Path:
    """A repository of the first edit."""
    build(versions[0], tmp_path / "models", canary=canary)
    return tmp_path / "models"


@pytest.fixture
def networks(vectors: tuple[Path, Path], tmp_path: Path) -> Path:
    """The same with the networks as models of their own."""
    build(vectors[0], tmp_path / "models", ONNX_RUNTIME, canary=canary)
    return tmp_path / "models"


# --- built --------------------------------------------------------------------------------------------------------


def test_the_layout(repository: Path, versions: tuple[Path, Path], edits: tuple[Edit, Edit]) -> None:
    version = repository / "excise" / "1"
    assert sorted(path.name for path in repository.iterdir()) == ["excise", "repository.json"]
    assert sorted(path.name for path in (repository / "excise").iterdir()) == ["1", "config.pbtxt", "warmup"]
    assert sorted(path.name for path in version.iterdir()) == ["canary.json", "excise.json", "model.py", "onnx"]
    assert contents(version / "onnx") == contents(versions[0])
    assert all(os.path.samefile(version / "onnx" / name, versions[0] / name) for name in contents(versions[0]))
    assert verify(version) == []
    text = (version / "model.py").read_text()
    assert "from excise.serve.triton_model import TritonPythonModel" in text
    compile(text, "model.py", "exec")
    assert len(text.splitlines()) == 2
    found, id = config(repository), edits[0].id
    assert served_versions(found) == (1,)
    assert parameter(found, "excise.edit_id") == id
    assert parameter(found, "excise.manifest_sha256") == hash_file(version / NAME)
    assert json.loads(str(parameter(found, "excise.edits"))) == {"concept-1": id}
    assert read_record(repository) == read_copy(repository)
    document = json.loads((repository / COPY).read_text())
    assert (document["current"], document["previous"]) == (1, None)
    assert document["versions"]["1"]["edit"] == id
    assert (repository / "excise/warmup/steps").read_bytes() == b"\2\0\0\0"
    sound(repository)


def test_the_warmup_takes_no_more_steps_than_a_request_may(versions: tuple[Path, Path], tmp_path: Path) -> None:
    build(versions[0], tmp_path / "models", TritonOptions(max_steps=1))
    assert (tmp_path / "models/excise/warmup/steps").read_bytes() == b"\1\0\0\0"


def test_equal_exports_give_equal_repositories(vectors: tuple[Path, Path], tmp_path: Path) -> None:
    for name in ("a", "b"):
        build(vectors[0], tmp_path / name, ONNX_RUNTIME, canary=canary)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_copies_share_nothing(versions: tuple[Path, Path], tmp_path: Path) -> None:
    build(versions[0], tmp_path / "models", link=False)
    assert {path.stat().st_nlink for path in tmp_path.rglob("*") if path.is_file()} == {1}
    sound(tmp_path / "models")


def test_copies_where_the_disk_cant_link(
    versions: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    build(versions[0], tmp_path / "models")
    sound(tmp_path / "models")


def test_symbolic_links_arrive_as_files(versions: tuple[Path, Path], tmp_path: Path) -> None:
    folder = tmp_path / "linked"
    for name in contents(versions[0]):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).symlink_to(versions[0] / name)
    build(folder, tmp_path / "models")
    assert not [path for path in (tmp_path / "models").rglob("*") if path.is_symlink()]
    sound(tmp_path / "models")


def test_networks_of_their_own(networks: Path, vectors: tuple[Path, Path]) -> None:
    import onnxruntime

    assert sorted(path.name for path in networks.iterdir() if path.is_dir()) == sorted(["excise", *NETWORKS])
    assert parameter(config(networks), "excise.backend") == "bls"
    for name in NETWORKS:
        folder = networks / name / "1"
        assert os.path.samefile(folder / "model.onnx", vectors[0] / name / "model.onnx")
        assert verify(folder) == []
        assert not (folder / "base.safetensors").exists()
        session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
        found = config(networks, name)
        assert found.text("platform") == "onnxruntime_onnx"
        described = {one.text("name"): one for one in found.messages("input")}
        assert described.keys() == {one.name for one in session.get_inputs()}
        for node in session.get_inputs():
            shape = tuple(size if isinstance(size, int) else -1 for size in node.shape)
            assert described[node.name].all("dims") == shape
            assert not described[node.name].messages("reshape")
    assert {one.text("name"): one.all("dims") for one in config(networks, "unet").messages("input")}["timestep"] == (1,)
    sound(networks)


@pytest.mark.parametrize("backend", ["onnxruntime", "tensorrt"])
def test_a_scalar_timestep_is_refused_before_any_work(
    versions: tuple[Path, Path], networks: Path, tmp_path: Path, backend: Any
) -> None:
    options = TritonOptions(backend=backend, gpus=(0,) if backend == "tensorrt" else ())
    folder = with_engines(versions[0], tmp_path / "engines") if backend == "tensorrt" else versions[0]
    said: list[str] = []
    with pytest.raises(ArtefactError, match="timestep is a scalar, and Triton takes none: excise serve build") as found:
        build(folder, tmp_path / "other", options, progress=said.append)
    assert "\n" not in str(found.value)
    assert not said
    assert not (tmp_path / "other").exists()
    before = contents(networks)
    with pytest.raises(ArtefactError, match="timestep is a scalar"):
        promote(networks, versions[1])
    assert contents(networks) == before


def test_what_a_network_takes_is_read_as_the_onnx_package_reads_it(exported: Path) -> None:
    import onnx

    for name in NETWORKS:
        graph = onnx.load(exported / name / "model.onnx", load_external_data=False).graph
        found = read_signature(exported / name / "model.onnx")
        for ours, theirs in ((found.inputs, graph.input), (found.outputs, graph.output)):
            assert list(ours) == [one.name for one in theirs]
            for one in theirs:
                tensor = one.type.tensor_type
                dims = [dim.dim_value if dim.HasField("dim_value") else -1 for dim in tensor.shape.dim]
                assert list(ours[one.name].shape) == dims
                assert ours[one.name].dtype == onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type).name


def with_engines(folder: Path, out: Path, library: str = "tensorrt") -> Path:
    """An export with files in the place of engines, and the JSON of real ones."""
    shutil.copytree(folder, out)
    manifest, entries = read_manifest(out), {}
    for name in NETWORKS:
        engine = out / name / "model.engine"
        engine.write_bytes(f"plan of {name}".encode())
        signature = read_signature(out / name / "model.onnx")
        data = [path.name for path in engine.parent.glob("*onnx*")]
        entries[name] = EngineEntry.model_validate(
            {
                "excise": "0",
                "library": library,
                "version": "10",
                "onnx": "model.onnx",
                "sources": {one: file_entry(engine.parent / one) for one in data},
                "edit": manifest.edit.id if manifest.edit else None,
                "inputs": signature.inputs,
                "outputs": signature.outputs,
                "engine": file_entry(engine),
            }
        )
        entry_path(engine).write_text(entries[name].to_json())
    (out / NAME).unlink()

    class Library:
        name, version = "tensorrt", "10"

    record_engines(out, manifest, Library(), entries)  # type: ignore[arg-type]
    return out


def test_engines_become_plans(vectors: tuple[Path, Path], versions: tuple[Path, Path], tmp_path: Path) -> None:
    folder = with_engines(vectors[0], tmp_path / "engines")
    options = TritonOptions(backend="tensorrt", gpus=(0,))
    build(folder, tmp_path / "models", options)
    for name in NETWORKS:
        assert sorted(path.name for path in (tmp_path / "models" / name / "1").iterdir()) == [NAME, "model.plan"]
        assert config(tmp_path / "models", name).text("platform") == "tensorrt_plan"
    found = check(tmp_path / "models")
    assert found.problems == ()
    assert any("backend tensorrt" in note for note in found.notes)

    (folder / "unet/model.engine").write_bytes(b"another")
    with pytest.raises(ArtefactError, match=r"unet/model\.engine was altered"):
        build(folder, tmp_path / "other", options)
    with pytest.raises(UsageError, match="TensorRT-RTX"):
        build(with_engines(vectors[0], tmp_path / "rtx", "tensorrt_rtx"), tmp_path / "other", options)
    with pytest.raises(ArtefactError, match="build it with excise engines"):
        build(versions[0], tmp_path / "other", options)
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("backend", ["python", "onnxruntime"])
def test_the_base_is_served_only_on_purpose(plain: Path, base_bank: Path, tmp_path: Path, backend: Any) -> None:
    options = TritonOptions(backend=backend)
    with pytest.raises(UsageError, match="carries no edit: give --with-base"):
        build(plain, tmp_path / "models", options)
    with pytest.raises(UsageError, match="may choose the unedited model: give --with-base"):
        build(base_bank, tmp_path / "models", options)
    assert not list(tmp_path.iterdir())
    if backend == "onnxruntime":
        vector_timestep_folder(base_bank, tmp_path / "vector")
        base_bank = tmp_path / "vector"
    record = build(base_bank, tmp_path / "models", options, with_base=True)
    assert list(record.versions[1].edits.items())[1] == ("base", None), "the base is never the default"
    sound(tmp_path / "models")


def test_a_promotion_cant_let_the_base_in(repository: Path, plain: Path, base_bank: Path) -> None:
    before = contents(repository)
    for folder in (plain, base_bank):
        with pytest.raises(UsageError, match="give --with-base"):
            promote(repository, folder)
    assert contents(repository) == before


def test_a_bank_and_its_policy(bank: Path, edits: tuple[Edit, Edit], tmp_path: Path) -> None:
    policy = EditPolicy(default=("gun",), tenants={"studio": ("concept-2", "gun"), "suspended": ()})
    names = {"gun": edits[0].id[:10]}
    record = build(bank, tmp_path / "models", policy=policy, names=names)
    assert record.versions[1].edits == {"gun": edits[0].id, "concept-2": edits[1].id}
    assert record.versions[1].edit is None
    assert parameter(config(tmp_path / "models"), "excise.edit_id") is None
    assert json.loads((tmp_path / "models/excise/1/policy.json").read_text()) == policy.model_dump(mode="json")
    assert config(tmp_path / "models").messages("model_warmup")
    sound(tmp_path / "models")
    with pytest.raises(UsageError, match="'axe', which isn't here: these are gun, concept-2"):
        build(bank, tmp_path / "no", policy=EditPolicy(default=("axe",)), names=names)
    build(bank, tmp_path / "closed", policy=EditPolicy(tenants={"studio": ("gun",)}), names=names)
    assert not config(tmp_path / "closed").messages("model_warmup"), "it has no tenant and would be refused"


@pytest.mark.parametrize(
    ("tenant", "edit", "chosen"),
    [
        (None, None, "weapons"),
        (None, "weapons", "weapons"),
        ("unlisted", None, "weapons"),
        ("studio", None, "van-gogh"),
        ("studio", "weapons", "weapons"),
        (None, "van-gogh", None),
        ("unlisted", "van-gogh", None),
        ("suspended", None, None),
        ("suspended", "weapons", None),
        ("studio", "base", None),
        ("studio", "", None),
        ("", "van-gogh", None),
    ],
)
def test_who_may_choose_what(tenant: str | None, edit: str | None, chosen: str | None) -> None:
    policy = EditPolicy(default=("weapons",), tenants={"studio": ("van-gogh", "weapons"), "suspended": ()})
    if chosen is None:
        with pytest.raises(UsageError):
            policy.choose(tenant, edit)
    else:
        assert policy.choose(tenant, edit) == chosen
    if tenant != "studio":
        with pytest.raises(UsageError):
            EditPolicy(tenants={"studio": ("weapons",)}).choose(tenant, edit)


def test_a_broken_export_is_refused_and_nothing_is_left(versions: tuple[Path, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(versions[0], tmp_path / "broken"))
    data = bytearray((folder / "unet/edit.onnx_data").read_bytes())
    data[100] ^= 1
    (folder / "unet/edit.onnx_data").write_bytes(data)
    with pytest.raises(ArtefactError, match=r"unet/edit\.onnx_data was altered"):
        build(folder, tmp_path / "models")
    (folder / "unet/model.onnx").unlink()
    with pytest.raises(ArtefactError, match=r"no unet/model\.onnx"):
        build(folder, tmp_path / "models")
    with pytest.raises(OutputError, match="not empty"):
        build(versions[0], folder)
    assert [path.name for path in tmp_path.iterdir()] == ["broken"]


@pytest.mark.parametrize("names", [{"gun": "ffff"}, {"gun": ""}, {"base": ""}, {"a/b": ""}])
def test_names_that_cant_be(versions: tuple[Path, Path], tmp_path: Path, names: dict[str, str]) -> None:
    with pytest.raises(UsageError, match="edit name"):
        build(versions[0], tmp_path / "models", names=names)


# --- promoted and rolled back -------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", ["repository", "networks"])
def test_a_promotion_writes_only_what_the_edit_moved(
    which: str,
    edits: tuple[Edit, Edit],
    versions: tuple[Path, Path],
    vectors: tuple[Path, Path],
    request: pytest.FixtureRequest,
) -> None:
    repository: Path = request.getfixturevalue(which)
    inodes = {path.stat().st_ino for path in repository.rglob("*")}
    record = promote(repository, patched(edits[1]), canary=canary)
    assert (record.current, record.previous) == (2, 1)
    version = repository / "excise" / "2"
    own = {name for name in contents(version) if (version / name).stat().st_ino not in inodes}
    written = {"onnx/unet/model.onnx", "onnx/unet/edit.onnx_data", f"onnx/{NAME}"}
    assert own == {*written, "model.py", "canary.json", NAME}
    ours, theirs = contents(version / "onnx"), contents((vectors if which == "networks" else versions)[1])
    assert {name: ours[name] for name in ours if name != NAME} == {n: theirs[n] for n in theirs if n != NAME}
    new = {path.stat().st_ino: path.stat().st_size for path in repository.rglob("*") if path.is_file()}
    size = sum(size for inode, size in new.items() if inode not in inodes)
    weights = sum((version / name).stat().st_size for name in written)
    assert size < weights + 60_000, "beside the edited weights and the graph, some JSON"
    assert weights < 0.7 * sum(path.stat().st_size for path in versions[0].rglob("*") if path.is_file())
    assert served_versions(config(repository)) == (2,)
    assert parameter(config(repository), "excise.edit_id") == edits[1].id
    assert parameter(config(repository), "excise.canary") == "required"
    for name in record.networks:
        assert served_versions(config(repository, name)) == (1, 2)
        assert os.path.samefile(repository / name / "2/model.onnx", version / "onnx" / name / "model.onnx")
    sound(repository)

    back = rollback(repository)
    assert (back.current, back.previous) == (1, None)
    assert served_versions(config(repository)) == (1,)
    assert parameter(config(repository), "excise.edit_id") == edits[0].id
    assert read_copy(repository) == back
    sound(repository)
    forth = rollback(repository, to=2)
    assert (forth.current, forth.previous) == (2, 1)
    sound(repository)


def test_a_finished_folder_from_elsewhere_shares_what_is_equal(
    repository: Path, versions: tuple[Path, Path], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(versions[1], tmp_path / "elsewhere"))
    promote(repository, folder)
    assert parameter(config(repository), "excise.canary") == "off", "it wasn't recorded"
    first, second = repository / "excise/1/onnx", repository / "excise/2/onnx"
    assert os.path.samefile(first / "vae_decoder/model.onnx", second / "vae_decoder/model.onnx")
    assert os.path.samefile(folder / "unet/edit.onnx_data", second / "unet/edit.onnx_data")
    sound(repository)


def test_going_back_further_and_forward(repository: Path, edits: tuple[Edit, Edit], bank: Path) -> None:
    promote(repository, patched(edits[1]))
    promote(repository, patched(edits[0]))
    assert rollback(repository).current == 2
    assert rollback(repository).current == 1
    with pytest.raises(UsageError, match=r"served no version before 1: name one with --to \(1, 2, 3\)"):
        rollback(repository)
    with pytest.raises(UsageError, match="no version 7: these are 1, 2, 3"):
        rollback(repository, to=7)
    with pytest.raises(UsageError, match="serves version 1 already"):
        rollback(repository, to=1)
    assert (rollback(repository, to=3).previous, promote(repository, bank).previous) == (1, 3)
    assert read_record(repository).before == (1, 3)
    sound(repository)


def test_old_versions_are_removed_but_never_the_last_two(repository: Path, edits: tuple[Edit, Edit]) -> None:
    for edit in (edits[1], edits[0], edits[1]):
        promote(repository, patched(edit))
    rollback(repository, to=1)
    record = promote(repository, patched(edits[1]), keep=1)
    assert (record.current, record.previous, sorted(record.versions)) == (5, 1, [1, 5])
    assert sorted(path.name for path in (repository / "excise").iterdir() if path.is_dir()) == ["1", "5", "warmup"]
    sound(repository)
    assert promote(repository, patched(edits[0]), keep=3).before == (1, 5)


def test_what_is_served_already_isnt_promoted(repository: Path, edits: tuple[Edit, Edit]) -> None:
    promote(repository, patched(edits[1]))
    before = contents(repository)
    with pytest.raises(UsageError, match="serves that already, as version 2"):
        promote(repository, patched(edits[1]))
    assert contents(repository) == before


def test_what_a_person_set_stays(repository: Path, edits: tuple[Edit, Edit]) -> None:
    path = repository / "excise" / CONFIG
    text = path.read_text().replace("count: 1", "count: 3") + 'parameters { key: "mine" value { string_value: "x" } }'
    path.write_text("# tuned\n" + text)
    promote(repository, patched(edits[1]))
    rollback(repository)
    found = config(repository)
    assert found.messages("instance_group")[0].all("count") == (3,)
    assert parameter(found, "mine") == "x"
    sound(repository)


def test_a_policy_comes_along_where_its_names_still_hold(
    plain: Path, bank: Path, edits: tuple[Edit, Edit], tmp_path: Path
) -> None:
    repository = tmp_path / "models"
    build(bank, repository, policy=EditPolicy(default=("concept-1",)))
    one = tmp_path / "one"
    bank_folder(plain, one, edits[1:], link=False)
    with pytest.raises(UsageError, match="--policy"):
        promote(repository, one)
    promote(repository, one, policy=EditPolicy(default=("concept-2",)))
    assert json.loads((repository / "excise/2/policy.json").read_text())["default"] == ["concept-2"]
    sound(repository)


def test_another_kind_of_model_is_refused(networks: Path, vectors: tuple[Path, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(vectors[1], tmp_path / "larger"))
    unet = json.loads((folder / "unet/config.json").read_text())
    (folder / "unet/config.json").write_text(json.dumps({**unet, "sample_size": 16}))
    manifest = read_manifest(folder)
    (folder / NAME).unlink()
    write_manifest(folder, kind=manifest.kind, base=manifest.base, edit=manifest.edit, weights=manifest.weights)
    before = contents(networks)
    with pytest.raises(ArtefactError, match=r"IMAGES is .*build another repository"):
        promote(networks, folder)
    assert contents(networks) == before


def test_an_error_leaves_nothing(networks: Path, edits: tuple[Edit, Edit]) -> None:
    before = contents(networks)

    def fails(onnx: Path, folder: Path) -> None:
        (folder / "canary.json").write_text("{}")
        raise ArtefactError("the erased concept was detected")

    with pytest.raises(ArtefactError, match="was detected"):
        promote(networks, patched(edits[1]), canary=fails)
    assert contents(networks) == before


def test_two_at_a_time_are_refused(repository: Path, edits: tuple[Edit, Edit]) -> None:
    with locked(repository), pytest.raises(OutputError, match="being changed by another promote"):
        promote(repository, patched(edits[1]))
    promote(repository, patched(edits[1]))


def test_a_damaged_version_isnt_rolled_back_to(repository: Path, edits: tuple[Edit, Edit]) -> None:
    promote(repository, patched(edits[1]))
    (repository / "excise/1/onnx/unet/edit.onnx_data").unlink()
    with pytest.raises(ArtefactError, match=r"edit\.onnx_data is missing"):
        rollback(repository)
    assert read_record(repository).current == 2


# --- killed at any moment -----------------------------------------------------------------------------------------

_EVENTS = ("open", "os.link", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "shutil.rmtree", "shutil.copyfile")


def killed_at(number: int, work: Callable[[], object]) -> bool:
    """Run ``work`` in a child that dies at its ``number``-th step on the disk; whether it died."""
    child = os.fork()
    if child == 0:
        left = number

        def hook(event: str, arguments: tuple[Any, ...]) -> None:
            nonlocal left
            if event == "open" and isinstance(arguments[1], str) and arguments[1].startswith("r"):
                return  # reading changes nothing
            if event in _EVENTS:
                left -= 1
                if left < 0:
                    os._exit(9)

        sys.addaudithook(hook)
        status = 8
        try:
            work()
            status = 0
        finally:
            os._exit(status)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) in (0, 9)
    return os.waitstatus_to_exitcode(status) == 9


def reset(repository: Path, original: Path) -> None:
    shutil.rmtree(repository, ignore_errors=True)
    shutil.copytree(original, repository, copy_function=os.link)


@pytest.mark.parametrize("stride", [13, pytest.param(1, marks=pytest.mark.slow)])
def test_a_kill_leaves_the_old_version_or_the_new_one(
    networks: Path, edits: tuple[Edit, Edit], tmp_path: Path, stride: int
) -> None:
    promote(networks, patched(edits[1]))
    rollback(networks)
    original, seen, steps = networks.rename(tmp_path / "original"), set(), 0
    before = contents(original)

    def work() -> None:
        # drops version 2 too, so that removing is among the steps
        promote(networks, patched(edits[1]), keep=1)

    for number in range(0, 2000, stride):
        reset(networks, original)
        if not killed_at(number, work):
            break
        steps = number
        record = read_record(networks)
        seen.add(record.current)
        sound(networks)
        assert served_versions(config(networks)) == (record.current,)
        for name in NETWORKS:
            assert record.current in (served_versions(config(networks, name)) or ())
            unready = [
                path for path in (networks / name).iterdir() if path.name.isdecimal() and not (path / NAME).exists()
            ]
            assert unready == [], "Triton would load half a version"
        if number % 3 == 0:  # the next one goes through, and nothing is left of this one
            if record.current == 1:
                promote(networks, patched(edits[1]), keep=2)
            else:
                rollback(networks)
            assert not [note for note in check(networks).notes if "belongs to no version" in note]
            assert not list(networks.rglob(f"{PARTIAL}*"))
            sound(networks)
    assert seen == {1, 3}
    assert steps > 100
    assert contents(original) == before


def test_a_killed_rollback(networks: Path, edits: tuple[Edit, Edit], tmp_path: Path) -> None:
    promote(networks, patched(edits[1]))
    original, seen = networks.rename(tmp_path / "original"), set()
    for number in range(0, 100, 2):
        reset(networks, original)
        if not killed_at(number, lambda: rollback(networks)):
            break
        sound(networks)
        record = read_record(networks)
        seen.add(record.current)
        assert record.current in (served_versions(config(networks, "unet")) or ())
    assert seen == {1, 2}


# --- with a server ------------------------------------------------------------------------------------------------


class FakeTriton:
    """Answers as Triton's HTTP interface does; ``refuse`` are models that don't load.

    ``replies`` are status and error of the answers to requests for images, in order, where they aren't images;
    ``for_good``: what it refused to load it never loads again.
    """

    def __init__(self, repository: Path) -> None:
        self.replies: list[tuple[int, str]] = []
        self.asked: list[tuple[str, Any]] = []
        self.for_good = False
        self.repository, self.refuse, self.calls = repository, set[str](), list[tuple[str, tuple[int, ...] | None]]()
        self.ready: dict[str, tuple[int, ...]] = {}

    def answer(self, method: str, path: str, body: bytes = b"") -> tuple[int, Any]:
        parts = path.strip("/").split("/")
        if parts[-1] == "infer":
            self.asked.append((path, json.loads(body)))
            status, error = self.replies.pop(0) if self.replies else (200, "")
            return status, {"error": error} if error else {}
        if path == "/v2/health/live":
            return 200, {}
        if path == "/v2/repository/index":
            states = [(name, one) for name, versions in self.ready.items() for one in versions]
            return 200, [{"name": name, "version": str(one), "state": "READY"} for name, one in states]
        if parts[-1] == "load":
            name = parts[3]
            versions = served_versions(read_config_text(self.repository, name))
            self.calls.append((name, versions))
            if name in self.refuse and (self.for_good or len([one for one in self.calls if one[0] == name]) == 1):
                return 400, {"error": f"failed to load '{name}',\n the canary failed"}
            self.ready[name] = versions or ()
            return 200, {}
        if parts[-1] == "ready":
            return (200 if int(parts[4]) in self.ready.get(parts[2], ()) else 400), {}
        return 404, {"error": "no such place"}


@contextmanager
def listening(triton: FakeTriton) -> Iterator[str]:
    class Handler(BaseHTTPRequestHandler):
        def _reply(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            status, document = triton.answer(self.command, self.path, body)
            data = json.dumps(document).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        do_GET = do_POST = _reply

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def test_a_running_server_is_told_networks_first(networks: Path, edits: tuple[Edit, Edit]) -> None:
    triton = FakeTriton(networks)
    with listening(triton) as url, TritonServer(url, timeout=5) as server:
        promote(networks, patched(edits[1]), server=server)
        assert triton.calls == [*((name, (1, 2)) for name in NETWORKS), ("excise", (2,))]
        assert server.versions("excise") == {"2": "READY "}
        triton.calls.clear()
        rollback(networks, server=server)
    assert triton.calls == [*((name, (1, 2)) for name in NETWORKS), ("excise", (1,))]


@pytest.mark.parametrize("refusing", ["unet", "excise"])
def test_a_server_that_refuses_the_version_keeps_the_old_one(
    networks: Path, edits: tuple[Edit, Edit], refusing: str
) -> None:
    triton = FakeTriton(networks)
    triton.refuse.add(refusing)
    before = {name: config(networks, name) for name in ("excise", *NETWORKS)}
    message = rf"refused version 2: {refusing}: .*the canary failed; version 1 is"
    with (
        listening(triton) as url,
        TritonServer(url, timeout=5) as server,
        pytest.raises(ArtefactError, match=message),
    ):
        promote(networks, patched(edits[1]), server=server)
    assert {name: config(networks, name) for name in ("excise", *NETWORKS)} == before
    assert triton.ready == {"excise": (1,), **dict.fromkeys(NETWORKS, (1,))}
    assert not (networks / "excise/2").exists()
    assert not (networks / "unet/2").exists()
    assert read_record(networks).current == 1
    sound(networks)


def test_a_version_of_networks_of_their_own_is_asked_for_an_image(networks: Path, edits: tuple[Edit, Edit]) -> None:
    """Triton busy with others isn't a refusal, and neither is a request that a policy doesn't allow."""
    triton = FakeTriton(networks)
    triton.replies = [(503, "[request id: 1] Exceeds maximum queue size"), (503, "Request timeout expired"), (200, "")]
    with listening(triton) as url, TritonServer(url, timeout=5) as server:
        assert promote(networks, patched(edits[1]), server=server).current == 2
        assert len(triton.asked) == 3
        path, document = triton.asked[-1]
        assert path == "/v2/models/excise/versions/2/infer"
        inputs = {one["name"]: (one["datatype"], one["shape"], one["data"]) for one in document["inputs"]}
        assert inputs == {"PROMPT": ("BYTES", [1, 1], ["a photo"]), "NUM_INFERENCE_STEPS": ("INT32", [1, 1], [2])}
        triton.replies = [(400, "this tenant may choose no edit here")]
        assert rollback(networks, server=server).current == 1
        assert triton.asked[-1][0] == "/v2/models/excise/versions/1/infer"
    sound(networks)


def test_the_image_is_one_that_the_configuration_allows(
    vectors: tuple[Path, Path], edits: tuple[Edit, Edit], tmp_path: Path
) -> None:
    repository = tmp_path / "models"
    build(vectors[0], repository, TritonOptions(backend="onnxruntime", max_steps=1))
    triton = FakeTriton(repository)
    with listening(triton) as url, TritonServer(url, timeout=5) as server:
        promote(repository, patched(edits[1]), server=server)
        assert [one["data"] for one in triton.asked[-1][1]["inputs"]] == [["a photo"], [1]]
        path = repository / "excise" / CONFIG
        found = parse(path.read_text(), CONFIG)
        left = [one for one in found.messages("input") if one.text("name") != "NUM_INFERENCE_STEPS"]
        path.write_text(write(found.replaced("input", left)))
        rollback(repository, server=server)
        assert [one["name"] for one in triton.asked[-1][1]["inputs"]] == ["PROMPT"]


@pytest.mark.parametrize("status", [500, 503])
@pytest.mark.parametrize("back", [False, True])
def test_a_version_that_answers_with_a_failure_is_set_back(
    networks: Path, edits: tuple[Edit, Edit], status: int, back: bool
) -> None:
    triton = FakeTriton(networks)
    if back:
        promote(networks, patched(edits[1]))
    before, folders = contents(networks), {path for path in networks.rglob("*") if path.is_dir()}
    triton.replies = [(status, "the canary failed,\n roll back")]
    new, old = (1, 2) if back else (2, 1)
    message = rf"refused version {new}: excise: the canary failed, roll back; version {old} is"
    with listening(triton) as url, TritonServer(url, timeout=5) as server:
        with pytest.raises(ArtefactError, match=message):
            rollback(networks, server=server) if back else promote(networks, patched(edits[1]), server=server)
        assert triton.ready["excise"] == (old,)
        assert contents(networks) == before
        assert {path for path in networks.rglob("*") if path.is_dir()} == folders
    sound(networks)


def test_an_old_version_that_doesnt_come_back_is_said(networks: Path, edits: tuple[Edit, Edit]) -> None:
    triton = FakeTriton(networks)
    triton.refuse, triton.for_good = {"unet"}, True
    message = r"refused version 2: unet: .*; and then the old one: unet: .*models says version 1: see excise serve stat"
    with (
        listening(triton) as url,
        TritonServer(url, timeout=5) as server,
        pytest.raises(ArtefactError, match=message) as found,
    ):
        promote(networks, patched(edits[1]), server=server)
    assert "\n" not in str(found.value)
    assert triton.ready["excise"] == (1,), "the others are set back all the same"
    assert read_record(networks).current == 1


def test_only_those_are_asked(
    repository: Path, vectors: tuple[Path, Path], edits: tuple[Edit, Edit], tmp_path: Path
) -> None:
    """The canary of the Python backend has run at load; a model that streams doesn't answer plain requests."""
    streaming = tmp_path / "streaming"
    build(vectors[0], streaming, TritonOptions(backend="onnxruntime", stream_every=2))
    said: list[str] = []
    for one in (repository, streaming):
        triton = FakeTriton(one)
        with listening(triton) as url, TritonServer(url, timeout=5) as server:
            promote(one, patched(edits[1]), server=server, progress=said.append)
        assert triton.asked == []
    assert sum("streams, and isn't asked for an image" in line for line in said) == 1


def test_a_server_that_stays_busy_is_said(networks: Path, edits: tuple[Edit, Edit]) -> None:
    triton = FakeTriton(networks)
    triton.replies = [(503, "Exceeds maximum queue size")] * 10_000
    with (
        listening(triton) as url,
        TritonServer(url, timeout=0.5) as server,
        pytest.raises(ArtefactError, match=r"no place for one request in .*says version 2: see excise serve status"),
    ):
        promote(networks, patched(edits[1]), server=server)


def test_a_server_that_goes_away_is_said(repository: Path, edits: tuple[Edit, Edit]) -> None:
    triton = FakeTriton(repository)
    with listening(triton) as url:
        server = TritonServer(url, timeout=2)
    with server, pytest.raises(ArtefactError, match=r"didn't answer POST .*says version 2: see excise serve status"):
        promote(repository, patched(edits[1]), server=server)
    sound(repository)


def test_no_server_is_refused_before_any_work() -> None:
    with pytest.raises(UsageError, match="is that a Triton"):
        TritonServer("http://127.0.0.1:9", timeout=2)
    with pytest.raises(UsageError, match="give Triton's HTTP address"):
        TritonServer("ftp://127.0.0.1")


# --- checked ------------------------------------------------------------------------------------------------------


def rewrite(repository: Path, model: str, old: str, new: str) -> None:
    path = repository / model / CONFIG
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.unlink()
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        (lambda r: flip(r / "excise/1/onnx/unet/edit.onnx_data"), "edit.onnx_data was altered"),
        (lambda r: flip(r / "unet/1/edit.onnx_data"), "unet/1/edit.onnx_data was altered"),
        (lambda r: (r / "excise/1/onnx/tokenizer/vocab.json").unlink(), "vocab.json is missing"),
        (lambda r: (r / "excise/1/canary.json").unlink(), "canary.json is missing"),
        (lambda r: (r / "excise/1/model.py").write_text("import os"), "model.py was altered"),
        (lambda r: (r / "excise/1/extra.py").write_text(""), "extra.py is not in the manifest"),
        (lambda r: (r / "excise/1/excise.json").unlink(), "the record has version 1"),
        (lambda r: flip(r / "excise/1/excise.json"), "its SHA-256 isn't the record's"),
        (lambda r: shutil.rmtree(r / "unet/1"), "unet/1 is missing"),
        (lambda r: (r / "excise/warmup/steps").unlink(), "warms up with steps"),
        (lambda r: rewrite(r, "unet", "dims: [-1, 4, ", "dims: [-1, 5, "), "input sample is TYPE_FP32"),
        (lambda r: rewrite(r, "unet", "dims: 1\n", "dims: 1\nreshape { }\n"), "scalar, and the network's is"),
        (lambda r: rewrite(r, "unet", "dims: 1\n", "dims: 2\n"), "input timestep is TYPE_"),
        (lambda r: rewrite(r, "vae_decoder", "TYPE_FP32", "TYPE_FP16"), "is TYPE_FP16"),
        (lambda r: rewrite(r, "excise", "[16, 16, 3]", "[16, 17, 3]"), "IMAGES is [16, 17, 3]"),
        (lambda r: rewrite(r, "excise", 'name: "PROMPT"', 'name: "PROMT"'), "no input PROMT"),
        (lambda r: rewrite(r, "excise", "versions: 1", "versions: 2"), "serves versions 2, and its record says 1"),
        (lambda r: rewrite(r, "unet", "versions: 1", "versions: 4"), "the pipeline calls 1"),
        (lambda r: rewrite(r, "unet", 'name: "unet"', 'name: "net"'), "Triton wants its folder's name"),
    ],
)
def test_a_check_finds(networks: Path, damage: Callable[[Path], object], problem: str) -> None:
    # hard links would let the damage reach the export that other tests use
    copy = networks.with_name("copy")
    shutil.copytree(networks, copy)
    damage(copy)
    found = check(copy)
    assert any(problem in line for line in found.problems), found.problems
    report, text, is_sound = inspect_repository(copy)
    assert not is_sound
    assert problem in text
    assert report["kind"] == "triton-repository"


def test_a_check_by_the_schema(networks: Path) -> None:
    pytest.importorskip("tritonclient")
    rewrite(networks, "unet", "max_batch_size", "max_batches")
    assert any("isn't one by Triton's schema" in line for line in check(networks).problems)


def test_a_check_says_what_it_couldnt_tell(networks: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (networks / "excise/1/__pycache__").mkdir()
    (networks / "excise/1/__pycache__/model.cpython-311.pyc").write_bytes(b"")
    (networks / "excise/9").mkdir()
    monkeypatch.setattr("excise.serve.repository_check.schema", lambda: None)
    monkeypatch.setattr("shutil.which", lambda name: None)
    found = check(networks)
    assert found.problems == ()
    notes = "\n".join(found.notes)
    assert "no tritonserver with the backend onnxruntime here" in notes
    assert "weren't compared with Triton's schema" in notes
    assert "excise/9 belongs to no version" in notes


def test_folders_that_are_no_repository(tmp_path: Path, repository: Path) -> None:
    with pytest.raises(ArtefactError, match="no repository of excise"):
        check(tmp_path)
    (repository / COPY).write_text("{")
    with pytest.raises(ArtefactError, match="isn't JSON"):
        check(repository)
    (repository / COPY).write_text(json.dumps({"format": 2}))
    with pytest.raises(ArtefactError, match="malformed"):
        rollback(repository)


def test_the_record_reads_what_it_writes(repository: Path, edits: tuple[Edit, Edit]) -> None:
    record = promote(repository, patched(edits[1]))
    assert Record.model_validate_json(record.to_json()) == record
    bad = json.loads(record.to_json())
    bad["current"] = 7
    with pytest.raises(ValueError, match="version 7 is served"):
        Record.model_validate(bad)
    text = (repository / "excise" / CONFIG).read_text()
    assert write(parse(text, CONFIG)) == text
