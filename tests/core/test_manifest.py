"""The manifest: written, parsed back, and every kind of change in the folder found."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

from excise.errors import ArtefactError
from excise.manifest import (
    NAME,
    BaseEntry,
    EditEntry,
    Manifest,
    WeightEntry,
    hash_file,
    hash_folder,
    read_manifest,
    verify,
    write_manifest,
)

SITE = "mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight"
WEIGHT = WeightEntry(
    file="unet/model.onnx",
    node="/mid_block/attentions.0/transformer_blocks.0/attn2/to_k/MatMul",
    initializer="onnx::MatMul_7",
    transposed=True,
    dtype="float32",
    shape=(32, 16),
    sha256="0" * 64,
)
BASE = BaseEntry(name="tiny", pipeline="StableDiffusionPipeline")
EDIT = EditEntry(id="e" * 64, summary="rece: 'gun' → ' '", sites=(SITE,))


def fill(folder: Path) -> Path:
    (folder / "unet").mkdir(parents=True)
    (folder / "unet" / "model.onnx").write_bytes(b"\x00weights\xff" * 1000)
    (folder / "model_index.json").write_text("{}")
    return folder


def write(folder: Path) -> Manifest:
    return write_manifest(
        folder, kind="onnx-pipeline", base=BASE, edit=EDIT, weights={SITE: WEIGHT}, parity={"unet_relative": 1e-7}
    )


@pytest.fixture
def artefact(tmp_path: Path) -> Path:
    folder = fill(tmp_path / "artefact")
    write(folder)
    return folder


def test_it_is_read_back_as_written(artefact: Path) -> None:
    manifest = read_manifest(artefact)
    assert manifest == write(artefact)
    assert set(manifest.files) == {"unet/model.onnx", "model_index.json"}
    data = (artefact / "unet" / "model.onnx").read_bytes()
    assert manifest.files["unet/model.onnx"].sha256 == hashlib.sha256(data).hexdigest()
    assert manifest.files["unet/model.onnx"].size == len(data)
    assert manifest.edit == EDIT
    assert manifest.weights == {SITE: WEIGHT}
    assert manifest.tools["numpy"]
    assert verify(artefact) == []


def test_equal_folders_have_equal_manifests(artefact: Path, tmp_path: Path) -> None:
    other = fill(tmp_path / "other")
    write(other)
    text = (artefact / NAME).read_text()
    assert (other / NAME).read_text() == text
    assert text == json.dumps(json.loads(text), indent=2, sort_keys=True, ensure_ascii=False) + "\n"
    assert str(tmp_path) not in text


def test_one_flipped_byte_is_found(artefact: Path) -> None:
    path = artefact / "unet" / "model.onnx"
    data = bytearray(path.read_bytes())
    data[5000] ^= 1
    path.write_bytes(data)
    assert verify(artefact) == ["unet/model.onnx was altered: its SHA-256 isn't the manifest's"]


def test_missing_altered_and_extra_files_are_all_found(artefact: Path) -> None:
    (artefact / "unet" / "model.onnx").unlink()
    (artefact / "model_index.json").write_text("{ }")
    (artefact / "unet" / "engine.plan").write_bytes(b"x")
    assert verify(artefact) == [
        "model_index.json was altered: 3 bytes, and the manifest says 2",
        "unet/engine.plan is not in the manifest",
        "unet/model.onnx is missing",
    ]


def test_a_dangling_link_is_a_missing_file(artefact: Path) -> None:
    (artefact / "model_index.json").unlink()
    (artefact / "model_index.json").symlink_to(artefact / "nowhere")
    assert verify(artefact) == ["model_index.json is missing"]


def test_a_folder_without_manifest_says_so(tmp_path: Path) -> None:
    with pytest.raises(ArtefactError, match=r"has no excise\.json: it isn't an exported folder"):
        read_manifest(tmp_path)
    with pytest.raises(ArtefactError, match="doesn't exist"):
        verify(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 3}, r"has format version 3, and this excise reads version 2"),
        ({"format": "1"}, r"has format version '1', and this excise reads version 2"),
        ({"format": True}, r"has format version True"),
        ({"files": {"a": {"size": 1, "sha256": "zz"}}}, r"is malformed: files\.a\.sha256"),
        ({"files": {"../a": {"size": 1, "sha256": "0" * 64}}}, r"'\.\./a' is not a path inside the folder"),
        ({"files": {"/etc/a": {"size": 1, "sha256": "0" * 64}}}, r"is not a path inside the folder"),
        ({"surprise": 1}, r"is malformed: surprise"),
    ],
)
def test_a_wrong_field_is_named(artefact: Path, change: dict[str, object], message: str) -> None:
    content = json.loads((artefact / NAME).read_text()) | change
    (artefact / NAME).write_text(json.dumps(content))
    with pytest.raises(ArtefactError, match=message) as caught:
        read_manifest(artefact)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[]", b"{}", b"[" * 100_000])
def test_what_is_not_a_manifest_is_refused(artefact: Path, content: bytes) -> None:
    (artefact / NAME).write_bytes(content)
    with pytest.raises(ArtefactError, match=r"isn't JSON|isn't a manifest") as caught:
        read_manifest(artefact)
    assert "\n" not in str(caught.value)


def test_what_cannot_be_true_is_not_written(tmp_path: Path) -> None:
    folder = fill(tmp_path / "artefact")
    with pytest.raises(ArtefactError, match="parity"):
        write_manifest(folder, kind="onnx-pipeline", base=BASE, parity={"unet_relative": float("nan")})
    elsewhere = WEIGHT.model_copy(update={"file": "unet/other.onnx"})
    with pytest.raises(ArtefactError, match=r"has no unet/other\.onnx, which should hold mid_block"):
        write_manifest(folder, kind="onnx-pipeline", base=BASE, weights={SITE: elsewhere})
    assert not (folder / NAME).exists()


def test_hashing_tells_how_far_it_is(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"x" * 5_000_000)
    read: list[int] = []
    assert hash_file(tmp_path / "a", read.append) == hashlib.sha256(b"x" * 5_000_000).hexdigest()
    assert sum(read) == 5_000_000
    assert len(read) == 2


def test_long_hashing_shows_progress_on_stderr_only(
    artefact: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert verify(artefact) == []
    assert capsys.readouterr() == ("", "")
    monkeypatch.setattr("excise.manifest._SHOW_PROGRESS_FROM", 10)
    assert verify(artefact) == []
    out, err = capsys.readouterr()
    assert out == ""
    assert "hashing" in err


def test_it_needs_neither_torch_nor_onnx() -> None:
    code = "import sys, excise.manifest; print([m for m in ('torch', 'onnx', 'diffusers') if m in sys.modules])"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "[]"


def test_the_hash_of_a_folder_is_of_names_and_contents(tmp_path: Path) -> None:
    (tmp_path / "unet").mkdir()
    (tmp_path / "unet" / "config.json").write_text("{}")
    (tmp_path / "a.bin").write_bytes(b"12")
    first = hash_folder(tmp_path)
    assert len(first) == 64
    (tmp_path / "README.md").write_text("no model is loaded from it")
    (tmp_path / ".cache").mkdir()
    (tmp_path / ".cache" / "x").write_text("nor from this")
    assert hash_folder(tmp_path) == first
    (tmp_path / "a.bin").rename(tmp_path / "b.bin")
    renamed = hash_folder(tmp_path)
    (tmp_path / "b.bin").write_bytes(b"13")
    changed = hash_folder(tmp_path)
    assert len({first, renamed, changed}) == 3
    (tmp_path / "b.bin").rename(tmp_path / "a.bin")
    (tmp_path / "a.bin").write_bytes(b"12")
    assert hash_folder(tmp_path) == first
