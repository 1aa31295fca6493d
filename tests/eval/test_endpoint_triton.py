"""A Triton model as a runtime: its tensors, its batches, and the edit that its configuration names."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from excise.errors import ArtefactError, UsageError
from excise.eval.endpoint_http import Endpoint
from excise.eval.endpoint_triton import TritonRuntime, served_edit
from excise.serve.runtime import Request
from tests.eval.fake_endpoint import Answer, Asked, fake_endpoint

REQUESTS = [Request(f"a cat {seed}", negative_prompt="ü" if seed else "", seed=2**40 + seed) for seed in range(5)]


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


def painted(asked: Asked, nested: bool = False, **changes: Any) -> Answer:
    """Each image is its seed's last digits."""
    seeds = next(one["data"] for one in asked.body["inputs"] if one["name"] == "SEED")
    images = np.stack([np.full((2, 3, 3), seed % 256, np.uint8) for seed in seeds])
    data = images.tolist() if nested else images.ravel().tolist()
    tensor = {"name": "IMAGES", "datatype": "UINT8", "shape": list(images.shape), "data": data, **changes}
    return Answer({"model_name": "sd safe", "outputs": [{"name": "OTHER"}, tensor]})


@pytest.mark.parametrize("nested", [False, True])
def test_requests_are_sent_in_batches(nested: bool) -> None:
    with fake_endpoint(lambda asked: painted(asked, nested)) as server:
        runtime = TritonRuntime(Endpoint(server.url), "sd safe", name="server", batch_size=2)
        images = runtime.generate(REQUESTS, num_inference_steps=20, guidance_scale=5.5)
    assert images.shape == (5, 2, 3, 3)
    assert images.dtype == np.uint8
    assert images[:, 0, 0, 0].tolist() == [0, 1, 2, 3, 4]
    assert [one.path for one in server.asked] == ["/v2/models/sd%20safe/infer"] * 3
    assert server.asked[0].body == {
        "inputs": [
            {"name": "PROMPT", "datatype": "BYTES", "shape": [2, 1], "data": ["a cat 0", "a cat 1"]},
            {"name": "NEGATIVE_PROMPT", "datatype": "BYTES", "shape": [2, 1], "data": ["", "ü"]},
            {"name": "SEED", "datatype": "INT64", "shape": [2, 1], "data": [2**40, 2**40 + 1]},
            {"name": "NUM_INFERENCE_STEPS", "datatype": "INT32", "shape": [2, 1], "data": [20, 20]},
            {"name": "GUIDANCE_SCALE", "datatype": "FP32", "shape": [2, 1], "data": [5.5, 5.5]},
        ],
        "outputs": [{"name": "IMAGES"}],
    }
    assert server.asked[2].body["inputs"][0]["shape"] == [1, 1]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "image"}, r"has no output IMAGES \(it gave: OTHER, image\)"),
        ({"datatype": "FP32"}, r"gave IMAGES as FP32 \[2, 2, 3, 3\], not as UINT8"),
        ({"shape": [1, 2, 3, 3]}, r"not as UINT8 \[2, height, width, 3\]"),
        ({"shape": [2, 3, 2, 2]}, "not as UINT8"),
        ({"shape": [2, 2, -3, 3]}, "not as UINT8"),
        ({"shape": None}, "gave IMAGES as UINT8 None"),
        ({"data": [0] * 35}, "no UINT8 values of shape"),
        ({"data": [256] * 36}, "no UINT8 values of shape"),
        ({"data": [0.5] * 36}, "no UINT8 values of shape"),
        ({"data": [[0], [0, 1]]}, "no UINT8 values of shape"),
        ({"data": None}, "no UINT8 values of shape"),
    ],
)
def test_answers_that_are_no_images(changes: dict[str, Any], message: str) -> None:
    with fake_endpoint(lambda asked: painted(asked, **changes)) as server:
        runtime = TritonRuntime(Endpoint(server.url), "sd", name="server", batch_size=2)
        with pytest.raises(ArtefactError, match=message):
            runtime.generate(REQUESTS[:2])


def test_the_edit_is_what_the_configuration_names() -> None:
    def config(asked: Asked) -> Answer:
        parameters = {
            "/v2/models/edited/config": {"excise.edit_id": {"string_value": "ab" * 32}},
            "/v2/models/base/config": {},
        }
        found = parameters.get(asked.path)
        return Answer(status=404) if found is None else Answer({"name": "sd", "parameters": found})

    with fake_endpoint(config) as server:
        endpoint = Endpoint(server.url)
        assert served_edit(endpoint, "edited") == "ab" * 32
        assert served_edit(endpoint, "base") is None
        assert served_edit(endpoint, "unknown") is None


def test_a_model_that_is_not_there() -> None:
    def missing(_: Asked) -> Answer:
        return Answer({"error": "Request for unknown model: 'sd' is not found"}, 404)

    with fake_endpoint(missing) as server, pytest.raises(UsageError, match="404 Not Found: Request for unknown model"):
        TritonRuntime(Endpoint(server.url), "sd", name="server").generate(REQUESTS)
