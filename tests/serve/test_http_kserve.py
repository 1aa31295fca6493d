"""KServe's protocol: through Triton's client, excise's own, and by hand."""

from __future__ import annotations

import json
import struct
import warnings
from collections.abc import Iterator
from typing import Any

import httpx
import numpy as np
import pytest

from excise.eval.endpoint_http import Endpoint
from excise.eval.endpoint_triton import TritonRuntime, served_edit
from excise.serve.engine import ImageRequest
from excise.serve.http_errors import RequestRefused
from excise.serve.http_kserve_tensors import read_body
from excise.serve.runtime import Request
from tests.serve.fake_engine import SHAPE, STYLE, WEAPONS, FakeEngine, image_of
from tests.serve.http_serving import serving


@pytest.fixture(scope="module")
def engine() -> FakeEngine:
    return FakeEngine()


@pytest.fixture(scope="module")
def url(engine: FakeEngine) -> Iterator[str]:
    with serving(engine) as url:
        yield url


@pytest.fixture(scope="module")
def client(url: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=url) as client:
        yield client


def made(prompt: str, seed: int, steps: int, scale: float, edit: str | None = WEAPONS, negative: str = "") -> Any:
    return image_of(ImageRequest(Request(prompt, negative, seed, edit=edit), steps, scale))


@pytest.fixture(scope="module")
def triton() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip("tritonclient.http")


def inputs_of(triton: Any, prompts: list[str], binary: bool, edits: list[str] | None = None) -> list[Any]:
    n = len(prompts)
    columns: dict[str, tuple[str, Any]] = {
        "PROMPT": ("BYTES", np.array([text.encode() for text in prompts], object)),
        "NEGATIVE_PROMPT": ("BYTES", np.array([b"blue"] * n, object)),
        "SEED": ("INT64", np.arange(n, dtype=np.int64)),
        "NUM_INFERENCE_STEPS": ("INT32", np.arange(2, n + 2, dtype=np.int32)),
        "GUIDANCE_SCALE": ("FP32", np.arange(n, dtype=np.float32) + np.float32(1.5)),
    }
    if edits is not None:
        columns["EDIT"] = ("BYTES", np.array([text.encode() for text in edits], object))
    inputs = []
    for name, (datatype, values) in columns.items():
        tensor = triton.InferInput(name, [n, 1], datatype)
        tensor.set_data_from_numpy(values.reshape(n, 1), binary_data=binary)
        inputs.append(tensor)
    return inputs


@pytest.mark.parametrize("binary", [True, False])
def test_triton_client(url: str, triton: Any, binary: bool) -> None:
    with triton.InferenceServerClient(url.removeprefix("http://")) as client:
        assert client.is_server_live()
        assert client.is_server_ready()
        assert client.is_model_ready("tiny")
        assert client.is_model_ready("tiny@style", "1")
        assert not client.is_model_ready("tiny", "2")
        assert not client.is_model_ready("other")
        assert client.get_server_metadata()["name"] == "excise"
        assert client.get_model_metadata("tiny")["outputs"][0]["shape"] == [-1, *SHAPE]
        assert client.get_model_config("tiny@style")["parameters"]["excise.edit_id"] == {"string_value": STYLE}
        assert len(client.get_model_repository_index()) == 4
        prompts = ["a cat", "ein Hündchen 🐶", ""]
        answer = client.infer(
            "tiny",
            inputs_of(triton, prompts, binary, ["weapons", "style", "base"]),
            outputs=[triton.InferRequestedOutput("IMAGES", binary_data=binary)],
            request_id="some-id",
        )
    images = answer.as_numpy("IMAGES")
    assert answer.get_response()["id"] == "some-id"
    assert images.dtype == np.uint8
    assert images.shape == (3, *SHAPE)
    for row, (prompt, edit) in enumerate(zip(prompts, [WEAPONS, STYLE, None], strict=True)):
        np.testing.assert_array_equal(images[row], made(prompt, row, row + 2, row + 1.5, edit, "blue"))


def test_triton_client_without_named_outputs_and_with_errors(url: str, triton: Any) -> None:
    from tritonclient.utils import InferenceServerException  # type: ignore[import-untyped]

    with triton.InferenceServerClient(url.removeprefix("http://")) as client:
        answer = client.infer("tiny@base", inputs_of(triton, ["a cat"], True), timeout=5_000_000)
        np.testing.assert_array_equal(answer.as_numpy("IMAGES")[0], made("a cat", 0, 2, 1.5, None, "blue"))
        with pytest.raises(InferenceServerException, match="isn't served here"):
            client.infer("other", inputs_of(triton, ["a cat"], True))
        with pytest.raises(InferenceServerException, match="isn't served here"):
            client.infer("tiny", inputs_of(triton, ["a cat"], True, ["none such"]))


def test_own_client(url: str) -> None:
    runtime = TritonRuntime(Endpoint(url), "tiny", name="served", batch_size=2, concurrency=2)
    requests = [Request(f"cat {row}", "dull", seed=row) for row in range(5)]
    images = runtime.generate(requests, num_inference_steps=4, guidance_scale=3.0)
    for request, image in zip(requests, images, strict=True):
        np.testing.assert_array_equal(image, made(request.prompt, request.seed, 4, 3.0, WEAPONS, "dull"))
    assert served_edit(Endpoint(url), "tiny") == WEAPONS
    assert served_edit(Endpoint(url), "tiny@style") == STYLE
    assert served_edit(Endpoint(url), "tiny@base") is None
    assert served_edit(Endpoint(url), "other") is None


def tensor(name: str, datatype: str, data: Any, shape: Any = None, **more: Any) -> dict[str, Any]:
    return {"name": name, "datatype": datatype, "shape": shape or [len(data), 1], "data": data, **more}


PROMPT = tensor("PROMPT", "BYTES", ["a cat"])


def body_of(*tensors: Any, **more: Any) -> bytes:
    return json.dumps({"inputs": list(tensors), **more}).encode()


BAD: list[tuple[bytes, str]] = [
    (b"", "JSON"),
    (b"\x00\xff", "JSON"),
    (b"[" * 10_000, "JSON"),
    (b"{}", "inputs"),
    (body_of(), "inputs"),
    (body_of(PROMPT, PROMPT), "twice"),
    (body_of(tensor("SEED", "INT64", [1])), "PROMPT is missing"),
    (body_of(PROMPT, tensor("STEPS", "INT32", [1])), "STEPS"),
    (body_of(tensor("PROMPT", "FP32", [1.0])), "BYTES"),
    (body_of(tensor("PROMPT", "BYTES", [1])), "BYTES"),
    (body_of(tensor("PROMPT", "BYTES", ["a"], [2, 1])), "1 values"),
    (body_of(tensor("PROMPT", "BYTES", ["a"], [1, 1, 1])), "shape"),
    (body_of(tensor("PROMPT", "BYTES", ["a"], [-1, 1])), "shape"),
    (body_of(tensor("PROMPT", "BYTES", ["a"], [10**30, 1])), "values"),
    (body_of(tensor("PROMPT", "BYTES", [[["a"]]])), "BYTES"),
    (body_of(PROMPT, tensor("SEED", "INT64", [1, 2])), "2 rows"),
    (body_of(PROMPT, tensor("SEED", "INT64", [1.5])), "INT64"),
    (body_of(PROMPT, tensor("SEED", "INT64", [True])), "INT64"),
    (body_of(PROMPT, tensor("SEED", "INT64", [2**63])), "INT64"),
    (body_of(PROMPT, tensor("SEED", "INT64", [-1])), "SEED"),
    (body_of(PROMPT, tensor("NUM_INFERENCE_STEPS", "INT32", [2**31])), "INT32"),
    (body_of(PROMPT, tensor("NUM_INFERENCE_STEPS", "INT32", [0])), "NUM_INFERENCE_STEPS"),
    (body_of(PROMPT, tensor("NUM_INFERENCE_STEPS", "INT32", [101])), "100"),
    (body_of(PROMPT, tensor("GUIDANCE_SCALE", "FP32", [float("nan")])), "FP32"),
    (body_of(PROMPT, tensor("GUIDANCE_SCALE", "FP32", [10**400])), "FP32"),
    (body_of(PROMPT, tensor("GUIDANCE_SCALE", "FP32", [-1])), "GUIDANCE_SCALE"),
    (body_of(PROMPT, tensor("EDIT", "BYTES", ["../x"])), "isn't served"),
    (body_of(tensor("PROMPT", "BYTES", ["x"] * 9)), "rows of PROMPT=9"),
    (body_of(tensor("PROMPT", "BYTES", ["x" * 5000])), "4000"),
    (body_of(PROMPT, outputs=[{"name": "LATENTS"}]), "LATENTS"),
    (body_of(PROMPT, outputs=[{"name": "IMAGES", "parameters": {"classification": 3}}]), "classification"),
    (body_of(PROMPT, outputs=[{"name": "IMAGES", "parameters": {"binary_data": 3}}]), "binary_data"),
    (body_of(PROMPT, parameters={"timeout": -5}), "timeout"),
    (body_of({"name": "PROMPT", "datatype": "BYTES", "shape": [1, 1], "parameters": {"binary_data_size": 9}}), "bytes"),
    (
        body_of({**tensor("PROMPT", "BYTES", ["a"]), "parameters": {"shared_memory_region": "/etc/passwd"}}),
        "shared_memory",
    ),
]


@pytest.mark.parametrize(("body", "word"), BAD)
def test_bad_input(client: httpx.Client, body: bytes, word: str) -> None:
    answer = client.post("/v2/models/tiny/infer", content=body)
    assert answer.status_code == 400, answer.text
    assert set(answer.json()) == {"error"}
    assert word in answer.json()["error"]


def binary(name: str, datatype: str, raw: bytes, n: int = 1, size: int | None = None) -> tuple[bytes, str]:
    text = json.dumps(
        {
            "inputs": [
                {
                    "name": name,
                    "datatype": datatype,
                    "shape": [n, 1],
                    "parameters": {"binary_data_size": len(raw) if size is None else size},
                }
            ]
        }
    ).encode()
    return text + raw, str(len(text))


@pytest.mark.parametrize(
    ("request_", "word"),
    [
        (binary("PROMPT", "BYTES", b"\x01\x00\x00"), "length of an element"),
        (binary("PROMPT", "BYTES", struct.pack("<I", 2**32 - 1) + b"a"), "4294967295"),
        (binary("PROMPT", "BYTES", struct.pack("<I", 1) + b"\xff"), "UTF-8"),
        (binary("PROMPT", "BYTES", b"", n=1), "0 values"),
        (binary("PROMPT", "BYTES", struct.pack("<I", 1) + b"a", size=99), "99"),
        (binary("PROMPT", "BYTES", struct.pack("<I", 1) + b"a", size=-1), "-1"),
        (binary("PROMPT", "BYTES", struct.pack("<I", 1) + b"a", size=0), "0 values"),
        (binary("SEED", "INT64", b"\x00" * 9), "whole values"),
        ((body_of(PROMPT) + b"left over", str(len(body_of(PROMPT)))), "9 bytes follow"),
        ((body_of(PROMPT), "-4"), "inference-header"),
        ((body_of(PROMPT), "99999999999999999999999"), "inference-header"),
        ((body_of(PROMPT), "²"), "inference-header"),
    ],
)
def test_bad_binary(request_: tuple[bytes, str], word: str) -> None:
    with pytest.raises(RequestRefused, match=word):
        read_body(*request_)


def test_good_binary_and_nested_json_mean_the_same() -> None:
    raw = struct.pack("<I", 5) + b"a cat" + struct.pack("<I", 0)
    assert read_body(*binary("PROMPT", "BYTES", raw, n=2))[1] == {"PROMPT": ["a cat", ""]}
    for data in ([["a cat"], [""]], ["a cat", ""]):
        body = body_of(tensor("PROMPT", "BYTES", data), tensor("SEED", "INT64", [1, 2], [2]))
        assert read_body(body, None)[1] == {"PROMPT": ["a cat", ""], "SEED": [1, 2]}


def test_a_random_seed_is_told(client: httpx.Client) -> None:
    body = body_of(tensor("PROMPT", "BYTES", ["a", "b"]))
    answer = client.post("/v2/models/tiny@style/infer", content=body).json()
    seed = answer["parameters"]["excise.seed"]
    assert answer["parameters"]["excise.edit_id"] == STYLE
    images = np.array(answer["outputs"][0]["data"], np.uint8).reshape(2, *SHAPE)
    for row, prompt in enumerate("ab"):
        np.testing.assert_array_equal(images[row], made(prompt, seed + row, 25, 7.5, STYLE))


@pytest.mark.parametrize(
    "path",
    [
        "/v2/models/..%2f..%2fetc%2fpasswd/infer",
        "/v2/models/%2e%2e/config",
        "/v2/models/tiny%00/ready",
        "/v2/models/tiny/versions/2",
        "/v2/models/tiny/versions/..%2f1/ready",
        "/v2/models/tiny@other",
        "/v2/nothing",
        "/v2/models/",
    ],
)
def test_no_such_model(client: httpx.Client, path: str) -> None:
    answer = client.request("POST" if path.endswith("infer") else "GET", path)
    assert answer.status_code == 404
    assert set(answer.json()) == {"error"}
    assert isinstance(answer.json()["error"], str)


def test_forms_of_other_sites_are_refused(client: httpx.Client) -> None:
    headers = {"content-type": "text/plain"}
    assert client.post("/v2/models/tiny/infer", content=body_of(PROMPT), headers=headers).status_code == 415
