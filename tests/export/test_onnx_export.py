"""The whole export: what it writes, what it says, and that it leaves nothing when it fails."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from excise.errors import (
    ArtefactError,
    FingerprintMismatch,
    MissingExtra,
    ModelError,
    NoCrossAttention,
    NumericsError,
    OutputError,
)
from excise.export.onnx_export import _model_name, export_pipeline
from excise.export.pipeline import load_pipeline
from excise.manifest import FORMAT, hash_file, read_manifest, verify
from excise.onnx_metadata import read_edit_id

OPTIMUM = "optimum.exporters.onnx.export"
VALIDATION = "optimum.exporters.onnx.validate_model_outputs"


def test_the_manifest_describes_and_verifies_the_folder(edited: Path, edit: Any, tiny_model: Path) -> None:
    manifest = read_manifest(edited)
    assert verify(edited) == []
    assert manifest.kind == "onnx-pipeline"
    assert manifest.edit is not None
    assert (manifest.edit.id, manifest.edit.summary, manifest.edit.sites) == (edit.id, edit.summary, edit.sites)
    assert set(manifest.weights) == set(edit.sites)
    assert manifest.base.name == "model"
    unet = "unet/diffusion_pytorch_model.safetensors"
    assert manifest.base.weights == {unet: hash_file(tiny_model / unet)}
    assert {"torch", "diffusers", "optimum-onnx", "onnx"} <= set(manifest.tools)
    assert manifest.parity["unet_relative"] < 1e-4
    assert manifest.parity["unet_edit_relative"] > 0.01
    models = {f"{part}/model.onnx" for part in ("text_encoder", "unet", "vae_decoder", "vae_encoder")}
    assert models | {"tokenizer/tokenizer.json", "scheduler/scheduler_config.json"} <= set(manifest.files)


def test_without_an_edit_every_key_and_value_weight_is_mapped(plain: Path, edited: Path, edit: Any) -> None:
    manifest, other = read_manifest(plain), read_manifest(edited)
    assert manifest.edit is None
    assert manifest.parity == {}
    assert set(manifest.weights) == set(edit.sites)
    for name, entry in manifest.weights.items():
        assert entry.initializer == other.weights[name].initializer
        assert entry.sha256 != other.weights[name].sha256
    assert verify(plain) == []


def test_the_onnx_file_carries_the_edits_id(plain: Path, edited: Path, edit: Any) -> None:
    assert read_edit_id(edited / "unet" / "model.onnx") == edit.id
    assert read_edit_id(plain / "unet" / "model.onnx") is None
    for path in edited.rglob("*.onnx"):
        onnx.checker.check_model(str(path))


def test_only_the_unet_differs_from_the_plain_export(plain: Path, edited: Path) -> None:
    one, other = read_manifest(plain).files, read_manifest(edited).files
    assert set(one) == set(other)
    assert [path for path in one if one[path] != other[path]] == ["unet/edit.onnx_data", "unet/model.onnx"]


def test_no_path_of_this_machine_is_published(edited: Path, tiny_model: Path) -> None:
    for path in edited.rglob("*"):
        if path.is_file():
            assert str(tiny_model.parent).encode() not in path.read_bytes(), path


def test_optimum_loads_and_runs_the_folder(edited: Path, tiny_model: Path, edit: Any) -> None:
    import torch

    from excise.export.quiet import quiet

    with quiet():
        from optimum.onnxruntime import ORTStableDiffusionPipeline

        exported = ORTStableDiffusionPipeline.from_pretrained(edited, local_files_only=True)
        reference = load_pipeline(tiny_model, edit)
        images = []
        for pipe in (exported, reference):
            pipe.set_progress_bar_config(disable=True)
            latents = torch.from_numpy(np.random.default_rng(0).standard_normal((1, 4, 8, 8), np.float32))
            made = pipe("a gun", num_inference_steps=2, height=16, width=16, latents=latents, output_type="np")
            images.append(made.images)
    np.testing.assert_allclose(images[0], images[1], atol=1e-4)


def test_the_terminal_stays_quiet(tiny_model: Path, tmp_path: Path) -> None:
    code = (
        "import sys, pathlib; from excise.export.onnx_export import export_pipeline; "
        "export_pipeline(pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2])); "
        "import logging; logging.getLogger('diffusers').warning('still heard')"
    )
    command = [sys.executable, "-W", "default", "-c", code, str(tiny_model), str(tmp_path / "out")]
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    ran = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    assert ran.stdout == ""
    assert ran.stderr.strip() == "still heard"


def test_progress_is_told(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(OPTIMUM, fail(RuntimeError("stop")))
    with pytest.raises(ArtefactError):
        export_pipeline(tiny_model, tmp_path / "out", progress=said.append)
    assert said == [f"loading {tiny_model}", "exporting text_encoder to ONNX"]


def fail(error: BaseException, cause: BaseException | None = None) -> Any:
    """Something that writes half an export and raises."""

    def half(model: Any, description: Any, path: Path, **_: Any) -> None:
        path.write_bytes(b"half")
        print("chatter")
        raise error from cause

    return half


@pytest.mark.parametrize(
    ("error", "raised", "message"),
    [
        (RuntimeError("first line\nsecond line"), ArtefactError, "^the export to ONNX failed: first line$"),
        (RuntimeError(), ArtefactError, "^the export to ONNX failed: RuntimeError$"),
        (OSError("no such config"), ArtefactError, "^the export to ONNX failed: no such config$"),
        (OSError(errno.ENOSPC, "No space left on device"), OutputError, "no space left on the disk"),
        (KeyboardInterrupt(), KeyboardInterrupt, "^$"),
    ],
)
def test_a_failure_midway_leaves_nothing(
    tiny_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    error: BaseException,
    raised: type[BaseException],
    message: str,
) -> None:
    monkeypatch.setattr(OPTIMUM, fail(error))
    with pytest.raises(raised, match=message):
        export_pipeline(tiny_model, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr() == ("", "")


def test_the_cause_of_a_wrapped_failure_is_told(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(OPTIMUM, fail(RuntimeError("an error occurred"), ValueError("shapes differ")))
    with pytest.raises(ArtefactError, match="failed: shapes differ"):
        export_pipeline(tiny_model, tmp_path / "out")
    monkeypatch.setattr(OPTIMUM, fail(RuntimeError("an error occurred"), OSError(errno.ENOSPC, "full")))
    with pytest.raises(OutputError, match="no space left"):
        export_pipeline(tiny_model, tmp_path / "out")


def test_a_late_failure_leaves_nothing(
    tiny_model: Path,
    optimum: Path,
    edit: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """An exporter that loses the edit is caught by the weight map, and the folder doesn't appear."""

    def loses_the_edit(model: Any, description: Any, path: Path, **_: Any) -> tuple[list[str], list[str]]:
        shutil.copy(optimum / path.parent.name / path.name, path)
        return [], list(description.outputs)

    monkeypatch.setattr(OPTIMUM, loses_the_edit)
    with pytest.raises(ArtefactError, match="holds other values"):
        export_pipeline(tiny_model, tmp_path / "out", edit=edit)
    assert list(tmp_path.iterdir()) == []


def test_an_occupied_folder_is_refused_first_and_left_alone(tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("mine")
    said: list[str] = []
    with pytest.raises(OutputError, match="not empty"):
        export_pipeline(tiny_model, tmp_path / "out", progress=said.append)
    assert said == []
    assert [one.name for one in (tmp_path / "out").iterdir()] == ["mine"]


def test_a_half_written_model_leaves_nothing(tiny_model: Path, tmp_path: Path) -> None:
    model = shutil.copytree(tiny_model, tmp_path / "model")
    weights = model / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ModelError, match="is cut off or altered"):
        export_pipeline(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_edits_that_cannot_be_applied_pass_through(tiny_model: Path, edit: Any, tmp_path: Path) -> None:
    with pytest.raises(FingerprintMismatch, match="made for another model"):
        export_pipeline(tiny_model, tmp_path / "out", edit=replace(edit, foreign=True))
    with pytest.raises(NumericsError, match="changes none of these outputs"):
        export_pipeline(tiny_model, tmp_path / "out", edit=replace(edit, sites=()))
    assert list(tmp_path.iterdir()) == []


def test_an_edit_that_changes_nothing_is_refused(
    tiny_model: Path,
    plain: Path,
    edit: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(OPTIMUM, fail(RuntimeError("not reached")))
    with pytest.raises(NumericsError, match="changes none of these outputs"):
        export_pipeline(tiny_model, tmp_path / "out", edit=replace(edit, size=0.0))
    assert list(tmp_path.iterdir()) == []


def test_a_missing_optimum_names_the_extra(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "optimum.exporters.onnx", None)
    with pytest.raises(MissingExtra, match=r"optimum-onnx isn't installed: pip install 'excise\[export\]'"):
        export_pipeline(tiny_model, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_unet_without_text_is_refused(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("excise.export.denoisers.Denoiser.sites_of", lambda self, unet: ())
    with pytest.raises(NoCrossAttention, match="has no weights that read the text"):
        export_pipeline(tiny_model, tmp_path / "out")


def test_the_manifest_is_the_one_on_disk(edited: Path) -> None:
    assert json.loads((edited / "excise.json").read_text())["format"] == FORMAT
    assert read_manifest(edited).to_json() == (edited / "excise.json").read_text()


def test_models_over_two_gigabytes_keep_their_external_data(
    tiny_model: Path, edited: Path, edit: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_ONNX_EXTERNAL_DATA", "1")  # Optimum's switch for what it does over 2 GB
    manifest = export_pipeline(tiny_model, tmp_path / "out", edit=edit)
    assert "unet/model.onnx_data" in manifest.files
    assert manifest.parity["unet_relative"] < 1e-4
    assert manifest.weights == read_manifest(edited).weights
    assert read_edit_id(tmp_path / "out" / "unet" / "model.onnx") == edit.id
    assert verify(tmp_path / "out") == []


def test_optimums_doubts_are_told(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from optimum.exporters.error_utils import AtolError

    def doubts(description: Any, model: Any, path: Path, *_: Any, **__: Any) -> None:
        if path.parent.name == "unet":
            raise AtolError("off by 1:\n- sample")

    monkeypatch.setattr(VALIDATION, doubts)
    said: list[str] = []
    export_pipeline(tiny_model, tmp_path / "out", progress=said.append)
    assert said[1:4] == ["exporting text_encoder to ONNX", "exporting unet to ONNX", "unet: off by 1: - sample"]


def test_optimum_writing_nothing_is_an_error(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(OPTIMUM, lambda *_, **__: ([], []))
    with pytest.raises(ArtefactError, match=r"Optimum wrote no text_encoder/model\.onnx"):
        export_pipeline(tiny_model, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_each_component_is_exported_once_and_let_go(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While one component is exported, those before it are gone: the exporter holds no second copy."""
    import gc
    import weakref

    from optimum.exporters.onnx import export

    alive: list[weakref.ref[Any]] = []
    seen: list[tuple[str, int]] = []

    def watched(model: Any, description: Any, path: Path, **options: Any) -> Any:
        gc.collect()
        seen.append((path.parent.name, sum(one() is not None for one in alive)))
        alive.append(weakref.ref(model))
        return export(model, description, path, **options)

    monkeypatch.setattr(OPTIMUM, watched)
    export_pipeline(tiny_model, tmp_path / "out")
    assert seen == [("text_encoder", 0), ("unet", 0), ("vae_encoder", 0), ("vae_decoder", 0)]


@pytest.mark.parametrize("option", ["addition_embed_type", "class_embed_type", "encoder_hid_dim_type"])
def test_a_unet_that_reads_more_than_text_is_refused(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, option: str
) -> None:
    pipe = load_pipeline(tiny_model)
    pipe.unet.register_to_config(**{option: "text_time"})
    monkeypatch.setattr("excise.export.onnx_export.load_pipeline", lambda model: pipe)
    with pytest.raises(ModelError, match=f"denoiser with {option} 'text_time', which can't be exported"):
        export_pipeline(tiny_model, tmp_path / "out")


def test_a_model_from_the_hubs_cache_keeps_its_name() -> None:
    assert _model_name(Path("/hub/models--owner--a-name/snapshots/0123abc")) == "owner/a-name@0123abc"
    assert _model_name(Path("/models/mine")) == "mine"
