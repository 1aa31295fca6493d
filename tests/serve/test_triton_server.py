"""Repositories of the tiny pipeline on a real tritonserver.

It has the Python backend alone: where the networks are models of their own, they are ONNX Runtime in small Python
models here, in place of the ONNX Runtime or TensorRT backend.
"""

from __future__ import annotations

import json
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from excise.editfile import Edit
from excise.errors import ArtefactError
from excise.eval.endpoint_http import Endpoint
from excise.eval.endpoint_triton import TritonRuntime, served_edit
from excise.serve.canary import record
from excise.serve.edit_policy import EditPolicy
from excise.serve.onnx_runtime import OnnxRuntime
from excise.serve.runtime import Request
from excise.serve.triton_control import TritonServer
from excise.serve.triton_options import TritonOptions
from excise.serve.triton_repository import build, promote, rollback
from excise.serve.version_folder import write_network
from tests.serve.tritonserver import Triton, environment, running

pytestmark = pytest.mark.slow

STEPS = 4
Images = np.ndarray[Any, Any]

#: Stands in for the backends that this Triton hasn't: the ONNX file of the version in ONNX Runtime.
NETWORK = """
import onnxruntime
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    def initialize(self, args):
        file = f"{args['model_repository']}/{args['model_version']}/model.onnx"
        self.session = onnxruntime.InferenceSession(file)

    def execute(self, requests):
        responses = []
        for request in requests:
            feed = {}
            for node in self.session.get_inputs():
                feed[node.name] = pb_utils.get_input_tensor_by_name(request, node.name).as_numpy()
            names = [node.name for node in self.session.get_outputs()]
            outputs = [pb_utils.Tensor(*one) for one in zip(names, self.session.run(names, feed))]
            responses.append(pb_utils.InferenceResponse(output_tensors=outputs))
        return responses
"""


def canary(onnx: Path, version: Path) -> None:
    record(OnnxRuntime(onnx, threads=1), kept=("a cat",), num_inference_steps=2).write(version)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Triton]:
    with running(tmp_path_factory.mktemp("triton")) as triton:
        yield triton


@pytest.fixture(scope="module")
def repository(versions: tuple[Path, Path], server: Triton, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of the first edit, served as ``excise``. Tests that change it put it back."""
    folder = tmp_path_factory.mktemp("repository") / "models"
    serve(server, versions[0], folder, name="excise", max_queue_delay_microseconds=200_000)
    assert server.load("excise") is None, server.said()
    return folder


@pytest.fixture(scope="module")
def alone(versions: tuple[Path, Path]) -> Callable[[Request, int], Images]:
    """The image of a request, under the first or the second edit, from the bare runtime; int, (h, w, 3)."""
    runtimes = [OnnxRuntime(folder, threads=1) for folder in versions]

    def image(request: Request, edit: int = 0) -> Images:
        return runtimes[edit].generate([request], num_inference_steps=STEPS)[0].astype(int)

    return image


def serve(
    server: Triton, folder: Path, repository: Path, *, change: dict[str, str] | None = None, **options: Any
) -> None:
    """Build a repository where the server finds it; ``change`` are parameters to set, ``excise.`` left out."""
    more = {key: options.pop(key) for key in ("canary", "policy", "names") if key in options}
    build(folder, repository, TritonOptions(threads=1, **options), **{"canary": canary, **more})
    config = repository / str(options["name"]) / "config.pbtxt"
    for name, value in (change or {}).items():
        text = f'parameters {{ key: "excise.{name}" value {{ string_value: "{value}" }} }}\n'
        config.write_text(config.read_text() + text)
    for model in repository.iterdir():
        if model.is_dir():
            (server.models / model.name).symlink_to(model)


def document(prompt: str = "a cat", seed: int = 0, **tensors: tuple[str, Any]) -> dict[str, Any]:
    columns = {"PROMPT": ("BYTES", prompt), "SEED": ("INT64", seed), "NUM_INFERENCE_STEPS": ("INT32", STEPS), **tensors}
    return {
        "inputs": [
            {"name": name, "datatype": datatype, "shape": [1, 1], "data": [value]}
            for name, (datatype, value) in columns.items()
        ]
    }


def ask(server: Triton, prompt: str = "a cat", seed: int = 0, *, model: str = "excise") -> Images:
    answer = server.post(f"/v2/models/{model}/infer", document(prompt, seed))
    assert answer.is_success, answer.text
    (output,) = answer.json()["outputs"]
    return np.array(output["data"]).reshape(output["shape"])[0]


def grpc(server: Triton, mode: str, model: str, tmp_path: Path, **tensors: Any) -> dict[str, Images]:
    script = Path(__file__).with_name("triton_grpc.py")
    out = tmp_path / "responses.npz"
    texts = [f"{name}={json.dumps(values)}" for name, values in tensors.items()]
    command = [str(environment() / "bin/python"), str(script), server.grpc, mode, model, str(out), *texts]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    with np.load(out) as saved:
        return dict(saved)


def close(image: Images, expected: Images) -> bool:
    """A batch of another size rounds otherwise: at most one step of 255."""
    return bool(np.abs(image.astype(int) - expected).max() <= 1)


def test_every_client_gets_the_runtimes_images(
    server: Triton, repository: Path, alone: Callable[..., Images], edits: tuple[Edit, Edit], tmp_path: Path
) -> None:
    requests = [Request("a gun", seed=3), Request("a red apple", "a gun", seed=2**40)]
    expected = [alone(request) for request in requests]
    assert not close(expected[0], alone(requests[0], 1))  # so that the edit shows
    endpoint = Endpoint(f"http://{server.http}")
    assert served_edit(endpoint, "excise") == edits[0].id
    by_excise = TritonRuntime(endpoint, "excise", name="triton", batch_size=2).generate(
        requests, num_inference_steps=STEPS
    )
    by_grpc = grpc(server, "infer", "excise", tmp_path, PROMPT=["a gun"], SEED=[3], NUM_INFERENCE_STEPS=[STEPS])
    assert close(by_excise[0], expected[0])
    assert close(by_excise[1], expected[1])
    assert close(by_grpc["0.IMAGES"][0], expected[0])
    assert close(ask(server, "a gun", 3), expected[0])


def test_the_official_http_client(server: Triton, repository: Path, alone: Callable[..., Images]) -> None:
    tritonclient = pytest.importorskip("tritonclient.http")
    with tritonclient.InferenceServerClient(server.http) as client:
        assert client.is_model_ready("excise")
        inputs = [
            tritonclient.InferInput("PROMPT", [1, 1], "BYTES"),
            tritonclient.InferInput("NUM_INFERENCE_STEPS", [1, 1], "INT32"),
        ]
        inputs[0].set_data_from_numpy(np.array([[b"a cat"]], object))
        inputs[1].set_data_from_numpy(np.array([[STEPS]], np.int32))
        result = client.infer("excise", inputs)
        assert close(result.as_numpy("IMAGES")[0], alone(Request("a cat")))


def test_concurrent_clients_share_batches(server: Triton, repository: Path, alone: Callable[..., Images]) -> None:
    prompts = [("a gun", 1), ("a cat", 2), ("a tree", 3), ("a red apple", 4), ("", 5), ("a dog", 6)]
    steps = {"before": server.metric("excise_unet_steps_total", model="excise")}
    with ThreadPoolExecutor(len(prompts)) as pool:
        found = list(pool.map(lambda one: ask(server, *one), prompts))
    for image, (prompt, seed) in zip(found, prompts, strict=True):
        assert close(image, alone(Request(prompt, seed=seed)))
    statistics = server.get("/v2/models/excise/stats").json()["model_stats"][0]
    assert max(one["batch_size"] for one in statistics["batch_stats"]) > 1
    steps["after"] = server.metric("excise_unet_steps_total", model="excise")
    assert (steps["after"] or 0) - (steps["before"] or 0) < STEPS * len(prompts)


def test_bad_requests_get_400_and_the_server_lives(server: Triton, repository: Path) -> None:
    for bad, message in (
        (document("word " * 700), "tokens"),
        (document("x" * 5000), "PROMPT has 5000 characters"),
        (document(seed=-5), "seed=-5"),
        (document(NUM_INFERENCE_STEPS=("INT32", 10**6)), "at most 100"),
        (document(NUM_INFERENCE_STEPS=("INT32", 0)), "0 inference steps"),
        (document(EDIT=("BYTES", "../1")), "isn't served here"),
        (document(SEED=("FP32", 1.0)), "SEED"),
        ({"inputs": []}, "PROMPT"),
    ):
        answer = server.post("/v2/models/excise/infer", bad)
        assert answer.status_code == 400, answer.text
        assert message in answer.json()["error"]
    assert ask(server).shape == (16, 16, 3)


def test_metrics_say_what_is_served(server: Triton, repository: Path, edits: tuple[Edit, Edit]) -> None:
    ask(server)
    assert server.metric("excise_edit_info", model="excise", version="1", edit_id=edits[0].id) == 1
    assert server.metric("excise_canary_ok", model="excise") == 1
    assert (server.metric("excise_images_total", model="excise") or 0) >= 1


def test_promotion_and_rollback_under_load(
    server: Triton,
    repository: Path,
    versions: tuple[Path, Path],
    alone: Callable[..., Images],
    edits: tuple[Edit, Edit],
) -> None:
    stop, seen = threading.Event(), []
    expected = [alone(Request("a gun", seed=1), edit) for edit in (0, 1)]

    def client() -> None:
        while not stop.is_set():
            try:
                image = ask(server, "a gun", 1)
                seen.append(next((str(edit) for edit in (0, 1) if close(image, expected[edit])), "another image"))
            except Exception as error:
                seen.append(repr(error))

    threads = [threading.Thread(target=client) for _ in range(3)]
    for thread in threads:
        thread.start()
    try:
        with TritonServer(f"http://{server.http}") as control:
            promote(repository, versions[1], canary=canary, server=control)
            assert close(ask(server, "a gun", 1), expected[1])
            assert served_edit(Endpoint(f"http://{server.http}"), "excise") == edits[1].id
            assert server.metric("excise_canary_ok", model="excise", version="2") == 1
            rollback(repository, server=control)
            assert close(ask(server, "a gun", 1), expected[0])
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert set(seen) == {"0", "1"}
    assert seen[0] == "0"
    assert len(seen) > 5  # before, between and after, on however slow a machine
    _until(lambda: server.metric("excise_canary_ok", model="excise", version="2") is None)


def test_a_version_that_its_canary_refuses_is_not_promoted(
    server: Triton, repository: Path, versions: tuple[Path, Path], alone: Callable[..., Images], tmp_path: Path
) -> None:
    refused = pytest.raises(ArtefactError, match=r"Triton refused version .*canary.*other weights are in effect")
    with TritonServer(f"http://{server.http}") as control, refused:
        promote(repository, versions[1], canary=foreign(versions[0]), server=control)
    assert close(ask(server, "a gun", 1), alone(Request("a gun", seed=1)))


def test_a_tampered_weight_is_refused_at_load(server: Triton, versions: tuple[Path, Path], tmp_path: Path) -> None:
    serve(server, versions[0], tmp_path / "models", name="tampered")
    file = tmp_path / "models/tampered/1/onnx/vae_decoder/model.onnx"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.unlink()  # it is a hard link
    file.write_bytes(content)
    reason = server.load("tampered")
    assert reason is not None
    assert "onnx/vae_decoder/model.onnx was altered" in reason
    assert not server.get("/v2/models/tampered/ready").is_success


def test_previews_are_streamed_and_stop_with_the_client(
    server: Triton, versions: tuple[Path, Path], alone: Callable[..., Images], tmp_path: Path
) -> None:
    serve(server, versions[0], tmp_path / "models", name="stream", stream_every=2, change={"canary_interval": "0.5"})
    assert server.load("stream") is None, server.said()
    found = grpc(server, "stream", "stream", tmp_path, PROMPT=["a gun"], SEED=[3], NUM_INFERENCE_STEPS=[STEPS])
    steps = [int(found[f"{place}.STEP"][0, 0]) for place in range(len(found) // 2)]
    assert steps == [2, 4]
    assert close(found["1.IMAGES"][0], alone(Request("a gun", seed=3)))
    assert not close(found["0.IMAGES"][0], found["1.IMAGES"][0])

    before = server.metric("excise_unet_steps_total", model="stream") or 0
    many = {"PROMPT": ["a gun"] * 8, "NUM_INFERENCE_STEPS": [100] * 8}
    grpc(server, "cancel", "stream", tmp_path, **many)
    _until(lambda: server.metric("excise_cancelled_total", model="stream") == 1)
    assert 0 < (server.metric("excise_unet_steps_total", model="stream") or 0) - before < 100
    # meanwhile the canary's timer went on
    _until(lambda: (server.metric("excise_canary_runs_total", model="stream") or 0) >= 3)
    assert server.metric("excise_canary_failures_total", model="stream") == 0


def test_tenants_are_request_parameters(
    server: Triton, versions: tuple[Path, Path], edits: tuple[Edit, Edit], tmp_path: Path
) -> None:
    policy = EditPolicy(tenants={"studio": ("one",)})
    names = {"one": edits[0].id[:12]}
    serve(server, versions[0], tmp_path / "models", name="tenants", policy=policy, names=names)
    assert server.load("tenants") is None, server.said()
    refused = server.post("/v2/models/tenants/infer", document())
    assert refused.status_code == 400
    assert "may choose no edit" in refused.json()["error"]
    granted = server.post("/v2/models/tenants/infer", {**document(), "parameters": {"tenant": "studio"}})
    assert granted.is_success, granted.text


def foreign(folder: Path) -> Callable[[Path, Path], None]:
    """Records a canary of the model in ``folder`` as if it were of the version's own edit."""

    def recorder(onnx: Path, version: Path) -> None:
        made = record(OnnxRuntime(folder, threads=1), kept=("a cat",), num_inference_steps=2)
        made.model_copy(update={"edit_id": OnnxRuntime(onnx).edit_id, "manifest_sha256": None}).write(version)

    return recorder


@pytest.fixture
def python_networks(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Serves a repository as ``bls`` with networks of their own, which are small Python models."""

    def written(onnx: Path, name: str, backend: Any, folder: Path) -> None:
        write_network(onnx, name, backend, folder)
        (folder / "model.py").write_text(NETWORK)

    monkeypatch.setattr("excise.serve.triton_repository.write_network", written)

    def serve_networks(server: Triton, folder: Path, repository: Path, recorder: Callable[[Path, Path], None]) -> None:
        build(folder, repository, TritonOptions(name="bls", backend="onnxruntime"), canary=recorder)
        for name in ("text_encoder", "unet", "vae_decoder", "bls"):
            config = repository / name / "config.pbtxt"
            text = config.read_text().replace('platform: "onnxruntime_onnx"', 'backend: "python"')
            config.write_text(text.replace('"model.onnx"', '"model.py"'))
            (server.models / name).symlink_to(repository / name)
            assert server.load(name) is None, server.said()

    return serve_networks


@pytest.mark.parametrize("good", [True, False])
def test_the_networks_as_models_of_their_own(
    vectors: tuple[Path, Path],
    alone: Callable[..., Images],
    python_networks: Callable[..., None],
    tmp_path: Path,
    good: bool,
) -> None:
    """The canary runs in the warm-up; where it fails nothing is answered."""
    with running(tmp_path / "triton") as server:
        python_networks(server, vectors[0], tmp_path / "models", foreign(vectors[0 if good else 1]))
        assert server.metric("excise_canary_runs_total", model="bls") == 1  # in the warm-up
        assert server.metric("excise_canary_ok", model="bls") == good
        if good:
            assert close(ask(server, "a gun", 3, model="bls"), alone(Request("a gun", seed=3)))
        else:
            for prompt in ("a gun", ""):
                answer = server.post("/v2/models/bls/infer", document(prompt))
                assert answer.status_code == 503, answer.text
                assert "canary failed" in answer.json()["error"]


def test_networks_of_their_own_are_promoted_by_an_image(
    vectors: tuple[Path, Path], alone: Callable[..., Images], python_networks: Callable[..., None], tmp_path: Path
) -> None:
    """A canary that fails doesn't refuse the load there, but the image that a promotion asks for."""
    repository = tmp_path / "models"
    with running(tmp_path / "triton") as server:
        python_networks(server, vectors[0], repository, canary)
        expected = [alone(Request("a gun", seed=1), edit) for edit in (0, 1)]
        with TritonServer(f"http://{server.http}") as control:
            with pytest.raises(
                ArtefactError, match=r"Triton refused version 2: bls: the canary failed.*; version 1 is"
            ):
                promote(repository, vectors[1], canary=foreign(vectors[0]), server=control)
            assert not (repository / "bls" / "2").exists()
            assert close(ask(server, "a gun", 1, model="bls"), expected[0])
            assert promote(repository, vectors[1], canary=canary, server=control).current == 2
            assert close(ask(server, "a gun", 1, model="bls"), expected[1])
            assert rollback(repository, server=control).current == 1
            assert close(ask(server, "a gun", 1, model="bls"), expected[0])


@pytest.mark.parametrize("by", [signal.SIGTERM, signal.SIGINT])
def test_requests_under_way_are_finished_before_it_ends(
    versions: tuple[Path, Path], tmp_path: Path, by: signal.Signals
) -> None:
    with running(tmp_path / "triton") as server:
        serve(server, versions[0], tmp_path / "models", name="excise")
        assert server.load("excise") is None, server.said()
        with ThreadPoolExecutor(1) as pool:
            steps = {"NUM_INFERENCE_STEPS": ("INT32", 100)}
            under_way = pool.submit(server.post, "/v2/models/excise/infer", document(**steps))
            _until(lambda: server.metric("nv_inference_pending_request_count", model="excise") is not None)
            time.sleep(0.1)
            assert not under_way.done()
            assert server.stop(by) == 0
            assert under_way.result().is_success
        with pytest.raises(httpx.TransportError):
            server.get("/v2/health/live")


def _until(true: Callable[[], bool], seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, "it never came true"
        time.sleep(0.05)
