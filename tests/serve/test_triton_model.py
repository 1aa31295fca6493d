"""The model that runs inside Triton, with a made-up Triton: loading, batches, errors, cancellation, previews."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest

from excise.editfile import Edit
from excise.errors import ArtefactError
from excise.manifest import EditEntry, read_manifest, write_manifest
from excise.serve.canary import CanaryResult, record
from excise.serve.edit_policy import EditPolicy
from excise.serve.onnx_runtime import COMPONENTS, OnnxRuntime
from excise.serve.repository_record import read_config_text, read_record
from excise.serve.runtime import Request
from excise.serve.triton_model import TritonPythonModel
from excise.serve.triton_options import TritonOptions
from excise.serve.triton_repository import build
from excise.serve.triton_settings import Settings
from tests.serve import fake_triton
from tests.serve.fake_triton import InferenceRequest, InferenceResponse, Logger, MetricFamily, TritonError
from tests.serve.test_bank_runtime import make

#: What the tests ask for where they don't care.
FEW = {"NUM_INFERENCE_STEPS": [3]}


@pytest.fixture(autouse=True)
def pb_utils(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", fake_triton)
    monkeypatch.setattr(MetricFamily, "made", {})
    monkeypatch.setattr(Logger, "lines", [])


def canary(onnx: Path, version: Path) -> None:
    record(OnnxRuntime(onnx, threads=1), kept=("a cat",), num_inference_steps=2).write(version)


@pytest.fixture(scope="module")
def repository(versions: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of the first edit. Not to be changed by tests."""
    folder = tmp_path_factory.mktemp("triton") / "repository"
    build(versions[0], folder, TritonOptions(threads=1), canary=canary)
    return folder


def loaded(folder: Path, model: str = "excise", /, *, decoupled: bool = False, **parameters: str) -> TritonPythonModel:
    """Version 1 of a repository's model, with other parameters than it was built with."""
    config = triton_config(folder, model)
    config["model_transaction_policy"] = {"decoupled": decoupled}
    config["parameters"] |= {f"excise.{name}": {"string_value": value} for name, value in parameters.items()}
    made = TritonPythonModel()
    made.initialize(fake_triton.initialize_args(folder / model / "1", config))
    return made


def triton_config(repository: Path, model: str) -> dict[str, Any]:
    """As Triton hands it over, as far as the model looks at it."""
    config = read_config_text(repository, model)
    parameters = {
        str(one.text("key")): {"string_value": str(one.messages("value")[0].text("string_value"))}
        for one in config.messages("parameters")
    }
    return {"max_batch_size": config.all("max_batch_size")[0], "parameters": parameters}


@pytest.fixture(scope="module")
def model(repository: Path) -> Iterator[TritonPythonModel]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "triton_python_backend_utils", fake_triton)
        made = loaded(repository, canary_interval="0")
    yield made
    made.finalize()


def asked(**tensors: Any) -> fake_triton.Request:
    return fake_triton.Request({"PROMPT": ["a cat"], **FEW, **tensors})


def images(response: InferenceResponse) -> np.ndarray[Any, Any]:
    assert response.error() is None, response.error().message()  # type: ignore[union-attr]
    return response.tensors["IMAGES"].as_numpy()


def error(response: InferenceResponse) -> tuple[TritonError.Code, str]:
    found = response.error()
    assert found is not None
    return found.code(), found.message()


def test_makes_the_runtimes_images(model: TritonPythonModel, versions: tuple[Path, Path]) -> None:
    runtime = OnnxRuntime(versions[0], threads=1)
    request = fake_triton.Request(
        {
            "PROMPT": ["a gun", "a cat"],
            "NEGATIVE_PROMPT": ["ugly", ""],
            "SEED": [7, 8],
            "NUM_INFERENCE_STEPS": [4, 4],
            "GUIDANCE_SCALE": [3.0, 1.0],
        }
    )
    (response,) = model.execute([request]) or []
    expected = runtime.generate(
        [Request("a gun", "ugly", seed=7), Request("a cat", seed=8)], num_inference_steps=4, guidance_scale=[3.0, 1.0]
    )
    np.testing.assert_array_equal(images(response), expected)


def test_what_is_left_out_has_a_default(repository: Path, versions: tuple[Path, Path]) -> None:
    model = loaded(repository, canary="off", default_steps="2", default_guidance_scale="1")
    (response,) = model.execute([fake_triton.Request({"PROMPT": ["a cat"]})]) or []
    runtime = OnnxRuntime(versions[0], threads=1)
    expected = runtime.generate([Request("a cat", seed=0)], num_inference_steps=2, guidance_scale=1.0)
    np.testing.assert_array_equal(images(response), expected)


def test_requests_are_batched_and_bad_ones_fail_alone(model: TritonPythonModel, repository: Path) -> None:
    calls: list[int] = []
    predict = model._runtime.predict
    good = [
        {"PROMPT": ["a cat"], "SEED": [1]},
        {"PROMPT": ["a gun", "a dog"], "SEED": [2, 3], "GUIDANCE_SCALE": [2.0, 9.0], "NUM_INFERENCE_STEPS": [3, 3]},
        {"PROMPT": ["a tree"], "NUM_INFERENCE_STEPS": [2], "NEGATIVE_PROMPT": ["green"]},
    ]
    bad: list[tuple[Mapping[str, Any], str]] = [
        ({"PROMPT": [b"\xff\xfe"]}, "PROMPT isn't UTF-8"),
        ({"PROMPT": ["word " * 700]}, "tokens"),
        ({"PROMPT": ["x" * 4001]}, "PROMPT has 4001 characters"),
        ({"SEED": [-1]}, "seed=-1"),
        ({"NUM_INFERENCE_STEPS": [0]}, "0 inference steps"),
        ({"NUM_INFERENCE_STEPS": [101]}, "NUM_INFERENCE_STEPS=101: this server takes at most 100"),
        ({"GUIDANCE_SCALE": [float("nan")]}, "guidance_scale=nan"),
        ({"EDIT": ["../../etc/passwd"]}, "EDIT='../../etc/passwd' isn't served here"),
        ({"PROMPT": ["a", "b"], "NUM_INFERENCE_STEPS": [2, 3]}, "share one number"),
        ({"PROMPT": ["a", "b"], "SEED": [1]}, "SEED has 1 rows, and PROMPT 2"),
        ({"SEED": np.zeros((1, 2), np.int64)}, r"SEED has shape (1, 2)"),
    ]

    def counted(sample: Any, *rest: Any, **named: Any) -> Any:
        calls.append(len(sample))
        return predict(sample, *rest, **named)

    model._runtime.predict = counted  # type: ignore[method-assign]
    try:
        mixed = [asked(**tensors) for tensors in (*good, *(tensors for tensors, _ in bad))]
        responses = model.execute([*mixed[3:7], *mixed[:3], *mixed[7:]]) or []
        # three images in three steps and one in two, each with and without its prompt
        assert calls == [2, 2, 6, 6, 6]
        failed, made = [*responses[:4], *responses[7:]], responses[4:7]
        for tensors, response in zip(good, made, strict=True):
            alone = images((model.execute([asked(**tensors)]) or [None])[0])  # type: ignore[arg-type]
            assert np.abs(images(response).astype(int) - alone).max() <= 1
    finally:
        del model._runtime.predict
    for response, (_, message) in zip(failed, bad, strict=True):
        code, text = error(response)
        assert code is TritonError.INVALID_ARG
        assert message in text
        assert "\n" not in text


def test_values_that_are_not_finite_fail_alone(model: TritonPythonModel) -> None:
    with np.errstate(all="ignore"):
        responses = model.execute([asked(SEED=[1]), asked(GUIDANCE_SCALE=[3e38]), asked(SEED=[2])]) or []
    assert error(responses[1])[0] is TritonError.INTERNAL
    assert "aren't finite" in error(responses[1])[1]
    for place in (0, 2):
        assert images(responses[place]).shape == (1, 16, 16, 3)


def test_an_error_of_another_library_tells_no_details(
    model: TritonPythonModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("/secret/path")

    monkeypatch.setattr(model._runtime, "predict", broken)
    code, text = error((model.execute([asked()]) or [])[0])
    assert code is TritonError.INTERNAL
    assert "secret" not in text
    assert any("/secret/path" in line for line in Logger.lines)


def test_cancelled_requests_leave_the_batch(model: TritonPythonModel, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    predict = model._runtime.predict

    def counted(sample: Any, *rest: Any, **named: Any) -> Any:
        sizes.append(len(sample) // 2)
        return predict(sample, *rest, **named)

    monkeypatch.setattr(model._runtime, "predict", counted)
    tensors = {"PROMPT": ["a cat"], "NUM_INFERENCE_STEPS": [4]}
    first, last = fake_triton.Request({**tensors, "SEED": [1]}), fake_triton.Request({**tensors, "SEED": [2]})
    leaving = fake_triton.Request({"PROMPT": ["a gun", "a dog"], "NUM_INFERENCE_STEPS": [4, 4]}, cancel_after=2)
    responses = model.execute([first, leaving, last]) or []
    assert sizes == [4, 4, 2, 2]
    assert error(responses[1])[0] is TritonError.CANCELLED
    for request, response in ((first, responses[0]), (last, responses[2])):
        alone = images((model.execute([request]) or [None])[0])  # type: ignore[arg-type]
        assert np.abs(images(response).astype(int) - alone).max() <= 1
    sizes.clear()
    everybody = [fake_triton.Request(tensors, cancel_after=1) for _ in range(2)]
    assert [error(one)[0] for one in model.execute(everybody) or []] == [TritonError.CANCELLED] * 2
    assert sizes == [2]


def test_images_that_the_model_does_not_make_are_counted(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> Any:
        raise RuntimeError("out of memory")

    model = loaded(repository, canary="off")
    monkeypatch.setattr(OnnxRuntime, "start", broken)
    model.execute([asked(PROMPT=["a", "b"], NUM_INFERENCE_STEPS=[3, 3]), asked()])
    values = {name: metric.value for name, metric in MetricFamily.made.items()}
    assert values["excise_images_failed_total{model_error}"] == 3
    assert values["excise_failed_total"] == 2, "requests"
    assert values["excise_images_total"] == 0


@pytest.mark.parametrize(("output", "tensor"), [("images", "IMAGES"), ("latents", "LATENTS")])
def test_previews_are_streamed(repository: Path, output: str, tensor: str) -> None:
    model = loaded(repository, decoupled=True, canary="off", stream_every="2", stream_output=output)
    good, bad = asked(NUM_INFERENCE_STEPS=[5], SEED=[4]), asked(SEED=[-4])
    assert model.execute([good, bad]) is None
    steps = [(int(one.tensors["STEP"].as_numpy()[0, 0]), flags) for one, flags in good.sent]
    assert steps == [(2, 0), (4, 0), (5, 1)]
    *previews, (last, _) = good.sent
    assert all(tensor in one.tensors for one, _ in previews)
    plain = loaded(repository, canary="off")
    alone = (plain.execute([asked(NUM_INFERENCE_STEPS=[5], SEED=[4])]) or [])[0]
    np.testing.assert_array_equal(images(last), images(alone))
    ((response, flags),) = bad.sent
    assert flags == 1
    assert error(response)[0] is TritonError.INVALID_ARG


def test_metrics_count(repository: Path) -> None:
    model = loaded(repository, canary_interval="0")
    model.execute(
        [asked(), asked(SEED=[1]), asked(SEED=[-1]), fake_triton.Request({"PROMPT": ["a"], **FEW}, cancel_after=1)]
    )
    values = {name: metric.value for name, metric in MetricFamily.made.items()}
    assert values["excise_images_total"] == 2
    assert values["excise_failed_total"] == 1
    assert values["excise_cancelled_total"] == 1
    assert values["excise_images_failed_total{model_error}"] == 0, "a request that can't be read is the client's"
    assert values["excise_images_failed_total{cancelled}"] == 1
    assert values["excise_unet_steps_total"] == 3
    assert values["excise_image_steps_total"] == 3 + 2 + 2
    assert values["excise_canary_runs_total"] == values["excise_canary_ok"] == 1
    assert values["excise_canary_max_latent_difference"] < 1e-3
    edit = read_record(repository).versions[1].edit
    info = MetricFamily.made["excise_edit_info"].labels
    assert info["edit_id"] == edit
    assert info["model"] == "excise"
    assert info["version"] == "1"


def refusal(make: Callable[[], object]) -> str:
    with pytest.raises(fake_triton.TritonModelException) as found:
        make()
    return str(found.value)


def test_a_tampered_weight_is_not_loaded(repository: Path, tmp_path: Path) -> None:
    broken = Path(shutil.copytree(repository, tmp_path / "repository"))
    file = broken / "excise/1/onnx/vae_decoder/model.onnx"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    assert "onnx/vae_decoder/model.onnx was altered" in refusal(lambda: loaded(broken))


def test_another_edit_manifest_or_canary_is_not_loaded(
    repository: Path, versions: tuple[Path, Path], tmp_path: Path
) -> None:
    without = {"repository": ""}
    text = refusal(lambda: loaded(repository, **without, edit_id="0" * 64))
    assert "and the configuration says edit 000000000000…" in text
    assert "SHA-256" in refusal(lambda: loaded(repository, **without, manifest_sha256="0" * 64))
    other = json.dumps({"x": "1" * 64})
    assert "excise.edits names 'x'" in refusal(lambda: loaded(repository, **without, edits=other))
    build(versions[0], tmp_path / "no canary", TritonOptions(threads=1))
    assert triton_config(tmp_path / "no canary", "excise")["parameters"]["excise.canary"]["string_value"] == "off"
    assert triton_config(repository, "excise")["parameters"]["excise.canary"]["string_value"] == "required"
    assert loaded(tmp_path / "no canary")._watch is None
    removed = Path(shutil.copytree(repository, tmp_path / "removed"))
    (removed / "excise/1/canary.json").unlink()
    assert "canary.json is missing" in refusal(lambda: loaded(removed))
    build(versions[0], tmp_path / "other", canary=lambda _, version: canary(versions[1], version))
    assert "was recorded of edit" in refusal(lambda: loaded(tmp_path / "other"))


def test_a_failing_canary_is_not_loaded(versions: tuple[Path, Path], tmp_path: Path) -> None:
    """Right files, right edit, other latents: as an engine of other weights would give."""

    def other(onnx: Path, version: Path) -> None:
        made = record(OnnxRuntime(versions[1], threads=1), kept=("a cat",), num_inference_steps=2)
        made.model_copy(update={"edit_id": OnnxRuntime(onnx).edit_id, "manifest_sha256": None}).write(version)

    build(versions[0], tmp_path / "repository", canary=other)
    text = refusal(lambda: loaded(tmp_path / "repository"))
    assert "the canary of" in text
    assert "other weights are in effect" in text
    assert MetricFamily.made["excise_canary_ok"].value == 0


@pytest.mark.parametrize("reaction", ["refuse", "report"])
def test_a_canary_that_fails_later(repository: Path, reaction: str) -> None:
    model = loaded(repository, canary_interval="0", canary_on_failure=reaction)
    assert model._watch is not None
    model._watch._run = lambda: CanaryResult(False, "rotten", 0.5, 1e-3, (), 0.1)
    model._watch.check()
    (response,) = model.execute([asked()]) or []
    if reaction == "refuse":
        code, text = error(response)
        assert code is TritonError.UNAVAILABLE
        assert "roll back" in text
    else:
        assert images(response).shape == (1, 16, 16, 3)
    assert MetricFamily.made["excise_canary_ok"].value == 0
    assert MetricFamily.made["excise_canary_failures_total"].value == 1
    assert any("rotten" in line for line in Logger.lines)


def test_requests_choose_of_a_bank_by_name(
    exported: Path, versions: tuple[Path, Path], edits: tuple[Edit, Edit], tmp_path: Path
) -> None:
    folder = make(exported, tmp_path / "bank", edits, with_base=False)
    old = read_manifest(versions[0])
    bank = [EditEntry(id=edit.id, summary="", sites=edit.sites) for edit in edits]
    write_manifest(folder, kind=old.kind, base=old.base, bank=bank)
    names = {"first": edits[0].id[:12], "second": edits[1].id[:12]}
    build(folder, tmp_path / "repository", TritonOptions(threads=1), names=names, canary=canary)
    model = loaded(tmp_path / "repository", canary_interval="0")
    chosen: list[dict[str, Any]] = [{}, {"EDIT": ["second"]}, {"EDIT": ["first"]}]
    responses = model.execute([asked(SEED=[5], **one) for one in chosen]) or []
    alone = [
        OnnxRuntime(one, threads=1).generate([Request("a cat", seed=5)], num_inference_steps=3).astype(int)
        for one in versions
    ]
    for response, place in zip(responses, (0, 1, 0), strict=True):
        assert np.abs(images(response) - alone[place]).max() <= 1
        assert np.abs(images(response) - alone[1 - place]).max() > 1
    (response,) = model.execute([asked(EDIT=["third"])]) or []
    assert error(response)[1] == "EDIT='third' isn't served here: name one of first, second"


def test_parameters_are_checked(repository: Path) -> None:
    for name, value, message in (
        ("threads", "0", "give an integer from 1"),
        ("threads", "many", "invalid literal"),
        ("backend", "onnx", "choose one of python, bls"),
        ("canary_interval", "nan", "finite"),
        ("edits", "[]", "JSON object"),
        ("stream_every", "3", "decoupled"),
    ):
        assert message in refusal(lambda name=name, value=value: loaded(repository, **{name: value}))  # type: ignore[misc]
    loaded(repository, canary="off", treads="1")
    assert any("excise.treads" in line for line in Logger.lines)


def test_the_record_speaks_for_each_version() -> None:
    record = {
        "backend": "tensorrt",
        "versions": {"4": {"edit": "e4", "edits": {"a": "e4"}, "manifest": "m4", "canary": False}, "5": {}},
    }
    parameters = {
        "excise.edit_id": {"string_value": "e5"},
        "excise.manifest_sha256": {"string_value": "m5"},
        "excise.repository": {"string_value": json.dumps(record)},
    }
    fourth, fifth = (Settings.read({"parameters": parameters}, version) for version in ("4", "5"))
    assert (fourth.edit_id, fourth.manifest_sha256, fourth.edits, fourth.networks) == (
        "e4",
        "m4",
        {"a": "e4"},
        "tensorrt",
    )
    assert (fourth.canary, fifth.canary) == ("off", "required")
    assert (fifth.edit_id, fifth.manifest_sha256) == ("e5", "m5")


@pytest.fixture
def networks(vectors: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """The other models of a made-up Triton, version 1 of each."""

    def network(name: str) -> Callable[..., Any]:
        session = onnxruntime.InferenceSession(str(vectors[0] / name / "model.onnx"))
        output = {"text_encoder": "last_hidden_state", "unet": "out_sample", "vae_decoder": "sample"}[name]

        def run(**values: Any) -> Any:
            if "timestep" in values:  # ONNX Runtime itself takes another shape with no more than a warning
                assert values["timestep"].shape == (1,)
            return session.run([output], values)[0]

        return run

    monkeypatch.setattr(InferenceRequest, "models", {(name, 1): network(name) for name in COMPONENTS})
    monkeypatch.setattr(InferenceRequest, "allowed", False)


@pytest.mark.usefixtures("networks")
def test_networks_may_be_other_models(versions: tuple[Path, Path], vectors: tuple[Path, Path], tmp_path: Path) -> None:
    """The same loop over calls of other models; the canary runs before the first request, for it can't before."""
    build(vectors[0], tmp_path / "repository", TritonOptions(backend="onnxruntime"), canary=canary)
    model = loaded(tmp_path / "repository", canary_interval="0")
    assert MetricFamily.made["excise_canary_runs_total"].value == 0
    InferenceRequest.allowed = True
    (response,) = model.execute([asked(SEED=[6])]) or []
    assert MetricFamily.made["excise_canary_ok"].value == 1
    expected = OnnxRuntime(versions[0]).generate([Request("a cat", seed=6)], num_inference_steps=3)
    assert np.abs(images(response).astype(int) - expected).max() <= 1

    # another unet behind the same name: the pipeline's canary notices, and nothing is answered from then on
    good = InferenceRequest.models["unet", 1]
    InferenceRequest.models["unet", 1] = lambda **values: good(**values) * np.float32(1.01)
    other = loaded(tmp_path / "repository", canary_interval="0")
    # but the warm-up request, for Triton can't bear an error there
    assert not images((other.execute([asked(PROMPT=[""])]) or [])[0]).any()
    for prompt in ("a cat", ""):
        assert error((other.execute([asked(PROMPT=[prompt])]) or [])[0])[0] is TritonError.UNAVAILABLE
    assert MetricFamily.made["excise_canary_ok"].value == 0

    def gone(**_: Any) -> Any:
        raise ArtefactError("unloaded")

    InferenceRequest.models["unet", 1] = gone
    code, text = error((model.execute([asked()]) or [])[0])
    assert code is TritonError.INTERNAL
    assert text == "the model unet of this server failed: unloaded"


def test_policy_decides_by_tenant(versions: tuple[Path, Path], tmp_path: Path) -> None:
    policy = EditPolicy(default=(), tenants={"studio": ("one",)})
    edit = str(OnnxRuntime(versions[0]).edit_id)
    build(versions[0], tmp_path / "repository", policy=policy, names={"one": edit[:12]}, canary=canary)
    model = loaded(tmp_path / "repository", canary="off")
    tensors = {"PROMPT": ["a cat"], **FEW}
    strangers: list[Mapping[str, Any]] = [{}, {"tenant": "nobody"}, {"tenant": 3}]
    for parameters in strangers:
        code, text = error((model.execute([fake_triton.Request(tensors, parameters=parameters)]) or [])[0])
        assert code is TritonError.INVALID_ARG
        assert "may choose no edit" in text
    for chosen in ({}, {"EDIT": ["one"]}, {"EDIT": [""]}):
        request = fake_triton.Request({**tensors, **chosen}, parameters={"tenant": "studio"})
        assert images((model.execute([request]) or [])[0]).shape == (1, 16, 16, 3)
