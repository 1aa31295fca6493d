"""ONNX models are called by the types that they declare, on the provider that was asked for."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from excise.errors import ArtefactError, UsageError
from excise.serve.onnx_runtime import OnnxRuntime
from excise.serve.runtime import Request

pytestmark = pytest.mark.filterwarnings(
    "ignore:`torch.jit.script`:FutureWarning",  # once, when diffusers is imported
    "ignore:__array__ implementation:DeprecationWarning",  # diffusers' Euler scheduler calls np.array(torch.Tensor)
)

REQUESTS = [Request("a gun", seed=1), Request("a red apple", "a gun", seed=2)]
SETTINGS: dict[str, Any] = {"num_inference_steps": 10, "guidance_scale": 5.0}


def retype(file: Path, name: str, declared: str, shape: list[str]) -> None:
    """Declares one input of an ONNX model with another type and shape, and casts it back inside."""
    import onnx
    from onnx import TensorProto, helper

    model = onnx.load(str(file))
    (value,) = (value for value in model.graph.input if value.name == name)
    for node in model.graph.node:
        node.input[:] = [f"{name}_inner" if used == name else used for used in node.input]
    cast = helper.make_node("Cast", [name], [f"{name}_cast"], to=value.type.tensor_type.elem_type)
    if shape == ["batch_size"]:
        model.graph.initializer.append(helper.make_tensor("first", TensorProto.INT64, [], [0]))
        last = helper.make_node("Gather", [f"{name}_cast", "first"], [f"{name}_inner"])
    else:
        last = helper.make_node("Identity", [f"{name}_cast"], [f"{name}_inner"])
    for node in (last, cast):
        model.graph.node.insert(0, node)
    value.CopyFrom(helper.make_tensor_value_info(name, getattr(TensorProto, declared), shape))
    onnx.save(model, str(file))


def test_inputs_of_other_exporters(copy: Path, runtime: OnnxRuntime) -> None:
    retype(copy / "unet" / "model.onnx", "timestep", "FLOAT16", ["batch_size"])
    retype(copy / "text_encoder" / "model.onnx", "input_ids", "INT32", ["batch_size", "sequence_length"])
    latents = OnnxRuntime(copy, threads=1).denoise(REQUESTS, **SETTINGS)
    np.testing.assert_allclose(latents, runtime.denoise(REQUESTS, **SETTINGS), atol=1e-4)


def test_integer_timestep(copy: Path, runtime: OnnxRuntime) -> None:
    retype(copy / "unet" / "model.onnx", "timestep", "INT64", [])
    latents = OnnxRuntime(copy, threads=1).denoise(REQUESTS, **SETTINGS)
    np.testing.assert_allclose(latents, runtime.denoise(REQUESTS, **SETTINGS), atol=1e-4)
    file = copy / "scheduler" / "scheduler_config.json"
    options = {"_class_name": "EulerDiscreteScheduler", "timestep_spacing": "linspace"}
    file.write_text(json.dumps({**json.loads(file.read_text()), **options}))
    with pytest.raises(ArtefactError, match=r"takes an integer timestep, not 856\.28"):
        OnnxRuntime(copy, threads=1).denoise(REQUESTS, num_inference_steps=8)


def test_unsupported_type(copy: Path) -> None:
    retype(copy / "unet" / "model.onnx", "timestep", "INT16", [])
    with pytest.raises(ArtefactError, match=r"timestep is a tensor\(int16\)"):
        OnnxRuntime(copy)


@pytest.mark.parametrize("provider", ["cuda", "tensorrt"])
def test_unavailable_provider(exported: Path, monkeypatch: pytest.MonkeyPatch, provider: Any) -> None:
    monkeypatch.setattr("onnxruntime.get_available_providers", lambda: ["CPUExecutionProvider"])
    with pytest.raises(
        UsageError, match=r"only CPUExecutionProvider: pip install 'excise\[gpu\]', or take provider cpu"
    ):
        OnnxRuntime(exported, provider=provider)


def test_provider_that_cannot_start(exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import onnxruntime

    class Fallen(onnxruntime.InferenceSession):  # type: ignore[misc]
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **{**options, "providers": ["CPUExecutionProvider"]})

    available = ["CUDAExecutionProvider", "CPUExecutionProvider"]
    monkeypatch.setattr("onnxruntime.get_available_providers", lambda: available)
    monkeypatch.setattr("onnxruntime.InferenceSession", Fallen)
    with pytest.raises(UsageError, match="CUDAExecutionProvider can't start on this machine"):
        OnnxRuntime(exported, provider="cuda")


class Asked(Exception):
    """Stands for a session, which no machine without a GPU could open."""


def asked(monkeypatch: pytest.MonkeyPatch, folder: Path, **options: Any) -> dict[str, dict[str, str]]:
    """What the first component's session is asked for, by provider."""
    import onnxruntime

    seen: list[Any] = []

    def session(file: str, settings: Any, providers: Any, **others: Any) -> None:
        seen.extend(providers)
        raise Asked

    monkeypatch.setattr("onnxruntime.get_available_providers", onnxruntime.get_all_providers)
    monkeypatch.setattr("onnxruntime.InferenceSession", session)
    with pytest.raises(ArtefactError):
        OnnxRuntime(folder, **options)
    return dict(seen)


def test_engines_are_kept_by_manifest_and_edit(
    versions: tuple[Path, Path], edits: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folders = []
    for folder, edit in ((versions[0], None), (versions[1], None), (versions[0], edits[1])):
        options = asked(monkeypatch, folder, provider="tensorrt", engine_cache=tmp_path, edit=edit, device=1)
        assert options["CUDAExecutionProvider"] == {"device_id": "1", "use_tf32": "0"}
        folders.append(options["TensorrtExecutionProvider"]["trt_engine_cache_path"])
    assert len(set(folders)) == 3


def test_a_folder_without_a_manifest_keeps_no_engines(
    exported: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    options = asked(monkeypatch, exported, provider="tensorrt", engine_cache=tmp_path)
    assert "trt_engine_cache_path" not in options["TensorrtExecutionProvider"]


def test_no_engine_of_files_that_were_altered(
    versions: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import onnxruntime

    folder = Path(shutil.copytree(versions[0], tmp_path / "altered"))
    shutil.copy(versions[1] / "unet" / "edit.onnx_data", folder / "unet" / "edit.onnx_data")
    monkeypatch.setattr("onnxruntime.get_available_providers", onnxruntime.get_all_providers)
    with pytest.raises(ArtefactError, match=r"engines are kept by that: unet/edit\.onnx_data was altered"):
        OnnxRuntime(folder, provider="tensorrt", engine_cache=tmp_path / "cache")


def test_corrupt_model(copy: Path) -> None:
    model = copy / "unet" / "model.onnx"
    model.write_bytes(model.read_bytes()[:1000])
    with pytest.raises(ArtefactError, match=r"unet/model.onnx isn't an ONNX model") as error:
        OnnxRuntime(copy)
    assert "\n" not in str(error.value)


def test_another_kind_of_model(copy: Path) -> None:
    shutil.copy(copy / "vae_decoder" / "model.onnx", copy / "unet" / "model.onnx")
    with pytest.raises(ArtefactError, match="takes latent_sample; a Stable Diffusion"):
        OnnxRuntime(copy)


def test_broken_config(copy: Path) -> None:
    (copy / "unet" / "config.json").write_text("{")
    with pytest.raises(ArtefactError, match=r"config\.json can't be read"):
        OnnxRuntime(copy)
