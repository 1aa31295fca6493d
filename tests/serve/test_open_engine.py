"""What is served of a folder: which edits, under which names, and never the base by accident."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from excise.editfile import Edit, save_edit
from excise.errors import ArtefactError, UsageError
from excise.manifest import NAME, BaseEntry, EditEntry, hash_file, read_manifest, write_manifest
from excise.serve.engine import Engine, ImageRequest
from excise.serve.onnx_runtime import OnnxRuntime
from excise.serve.open_engine import open_engine
from excise.serve.runtime import Request

STEPS, SCALE = 3, 5.0


def image(engine: Engine, edit: str | None) -> np.ndarray:
    job = engine.submit(ImageRequest(Request("a gun", seed=1, edit=edit), STEPS, SCALE))
    return job.future.result(60).astype(int)


def direct(folder: Path, edit: str | None = None) -> np.ndarray:
    runtime = OnnxRuntime(folder, threads=1)
    asked = [Request("a gun", seed=1, edit=edit)]
    return runtime.generate(asked, num_inference_steps=STEPS, guidance_scale=SCALE)[0].astype(int)


@pytest.fixture(scope="module")
def unedited(exported: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The export with a manifest that names no edit."""
    folder = Path(shutil.copytree(exported, tmp_path_factory.mktemp("unedited") / "onnx"))
    write_manifest(folder, kind="onnx-pipeline", base=BaseEntry(name="tiny", pipeline="StableDiffusionPipeline"))
    return folder


@pytest.fixture(scope="module")
def bank(unedited: Path, edits: tuple[Edit, Edit], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bank of both edits and the base."""
    from excise.export.text_edit_folders import bank_folder

    folder = tmp_path_factory.mktemp("bank") / "Tiny Bank!"
    bank_folder(unedited, folder, edits, with_base=True)
    return folder


def test_a_bank_with_its_base(bank: Path, edits: tuple[Edit, Edit]) -> None:
    given = {"first": edits[0].id[:10]}
    with open_engine(bank, names=given, default="first", with_base=True, threads=1, max_batch=4) as engine:
        served = engine.served
        assert served.model == "tiny-bank"
        assert [edit.id for edit in served.edits] == [edits[0].id, edits[1].id, None]
        assert (served.edits[0].name, served.edits[2].name) == ("first", "base")
        assert len({edit.name for edit in served.edits}) == 3
        assert served.image_shape == (16, 16, 3)
        assert served.max_prompt_tokens == 24
        assert served.manifest == hash_file(bank / NAME)
        assert served.concepts.keys() == {edit.name for edit in served.edits}
        assert served.concepts["first"] == ("concept 1",)
        assert served.concepts["base"] == ()
        found = [image(engine, edit.id) for edit in served.edits]
    for edit, one in zip(served.edits, found, strict=True):
        assert np.abs(one - direct(bank, edit.id)).max() <= 1
    assert np.abs(found[0] - found[2]).max() > 1


def test_the_base_of_a_bank_is_not_served_unless_asked_for(bank: Path, edits: tuple[Edit, Edit]) -> None:
    with open_engine(bank, model="tiny", threads=1) as engine:
        assert engine.served.model == "tiny"
        assert [edit.id for edit in engine.served.edits] == [edit.id for edit in edits]
        with pytest.raises(UsageError, match="no edit is named: choose one of "):
            image(engine, None)


def test_the_default_comes_first(bank: Path, edits: tuple[Edit, Edit]) -> None:
    second = {"second": edits[1].id}
    with open_engine(bank, names=second, default="second", threads=1) as engine:
        assert [edit.id for edit in engine.served.edits] == [edits[1].id, edits[0].id]
    with pytest.raises(UsageError, match="default edit 'third': choose one of "):
        open_engine(bank, default="third", threads=1)
    with pytest.raises(UsageError, match="default edit 'base'"):
        open_engine(bank, default="base", threads=1)


def test_a_folder_with_one_edit(versions: tuple[Path, Path], edits: tuple[Edit, Edit]) -> None:
    with open_engine(versions[0], threads=1) as engine:
        (only,) = engine.served.edits
        assert only.id == edits[0].id
        assert only.summary == edits[0].summary
        assert (image(engine, only.id) == image(engine, None)).all()
        assert np.abs(image(engine, None) - direct(versions[0])).max() <= 1
        with pytest.raises(UsageError, match="isn't served"):
            image(engine, edits[1].id)


def test_another_edit_in_place_of_the_folders(
    versions: tuple[Path, Path], edits: tuple[Edit, Edit], tmp_path: Path
) -> None:
    files = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    for edit, file in zip(edits, files, strict=True):
        save_edit(file, edit)
    with open_engine(versions[0], edits=[files[1]], threads=1) as engine:
        assert [edit.id for edit in engine.served.edits] == [edits[1].id]
        found = image(engine, None)
    assert np.abs(found - direct(versions[1])).max() <= 1
    assert np.abs(found - direct(versions[0])).max() > 1
    with pytest.raises(UsageError, match=r"2 edits would be so many models in memory.*excise bank .*--edit .*b\.safe"):
        open_engine(versions[0], edits=files)


def test_a_model_without_an_edit_is_not_served_by_accident(unedited: Path) -> None:
    with pytest.raises(UsageError, match="carries no edit: put one into it with excise patch, or give --with-base"):
        open_engine(unedited, threads=1)
    with open_engine(unedited, with_base=True, threads=1) as engine:
        assert [(edit.name, edit.id) for edit in engine.served.edits] == [("base", None)]
        assert np.abs(image(engine, None) - direct(unedited)).max() <= 1


def test_a_folder_that_is_not_as_its_manifest_says(unedited: Path, tmp_path: Path) -> None:
    unedited = Path(shutil.copytree(unedited, tmp_path / "copy"))
    config = unedited / "vae_decoder" / "config.json"
    config.write_text(config.read_text() + "\n")
    with pytest.raises(ArtefactError, match=r"isn't as its manifest says \(1\): vae_decoder/config.json was altered"):
        open_engine(unedited, with_base=True, threads=1)
    with open_engine(unedited, with_base=True, verify_files=False, threads=1):
        pass


def test_a_manifest_that_names_another_edit_is_not_believed(versions: tuple[Path, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(versions[0], tmp_path / "lying"))
    manifest = read_manifest(folder)
    lie = EditEntry(id="f" * 64, summary="rece: 'gun' → 'cat'", sites=())
    write_manifest(folder, kind=manifest.kind, base=manifest.base, edit=lie, known=manifest.files)
    with pytest.raises(ArtefactError, match="says that it holds edit ffffffffffff, and its model doesn't"):
        open_engine(folder, threads=1)
    write_manifest(folder, kind=manifest.kind, base=manifest.base, known=manifest.files)
    with pytest.raises(ArtefactError, match="says that it holds the base, and its model doesn't"):
        open_engine(folder, with_base=True, threads=1)


def test_a_folder_that_excise_did_not_write(exported: Path) -> None:
    with pytest.raises(ArtefactError, match=r"has no excise\.json"):
        open_engine(exported)
