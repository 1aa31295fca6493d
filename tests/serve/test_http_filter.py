"""The output filter: in the server, as a runtime, and NudeNet's own detector."""

from __future__ import annotations

import asyncio
import base64
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from excise.serve.engine import ImageRequest
from excise.serve.filtered_runtime import FilteredRuntime
from excise.serve.http_app import create_app
from excise.serve.http_settings import ServerSettings
from excise.serve.output_filter import HIDDEN, NudeNetFilter, Verdict, hidden
from excise.serve.runtime import Request
from tests.serve.fake_engine import WEAPONS, FakeEngine, image_of
from tests.serve.http_serving import client_of

PATH = "/v1/images/generations"
FOUND = Verdict(("BUTTOCKS_EXPOSED",), 0.9)


class OddFilter:
    """Flags the images that were given to it, by their bytes."""

    name = "odd filter"

    def __init__(self, *flagged: Any) -> None:
        self._flagged = {image.tobytes() for image in flagged}

    def verdicts(self, images: Sequence[Any]) -> list[Verdict]:
        return [FOUND if image.tobytes() in self._flagged else Verdict() for image in images]


class BrokenFilter(OddFilter):
    def verdicts(self, images: Sequence[Any]) -> list[Verdict]:
        raise RuntimeError("the detector is broken")


def made(seed: int) -> Any:
    return image_of(ImageRequest(Request("a", seed=seed, edit=WEAPONS), 25, 7.5))


def ask(how: Any, output_filter: OddFilter, tmp_path: Path) -> tuple[Any, Any, str]:
    async def asked() -> tuple[Any, Any, str]:
        settings = ServerSettings(output_filter=how, audit_log=tmp_path / "audit.jsonl")
        async with client_of(create_app(FakeEngine(), settings, output_filter=output_filter)) as client:
            images = await client.post(PATH, json={"prompt": "a", "seed": 1, "n": 2})
            tensor = {"name": "PROMPT", "datatype": "BYTES", "shape": [1, 1], "data": ["a"]}
            seed = {"name": "SEED", "datatype": "INT64", "shape": [1, 1], "data": [2]}
            tensors = await client.post("/v2/models/tiny/infer", json={"inputs": [tensor, seed]})
            return images, tensors, (await client.get("/metrics")).text

    return asyncio.run(asked())


def test_flagged_images_are_blurred(tmp_path: Path) -> None:
    images, tensors, metrics = ask("blur", OddFilter(made(2)), tmp_path)
    shown = [np.asarray(Image.open(io.BytesIO(base64.b64decode(one["b64_json"])))) for one in images.json()["data"]]
    np.testing.assert_array_equal(shown[0], made(1))
    np.testing.assert_array_equal(shown[1], hidden(made(2), "blur"))
    assert [one["blurred"] for one in images.json()["data"]] == [False, True]
    np.testing.assert_array_equal(np.array(tensors.json()["outputs"][0]["data"]), hidden(made(2), "blur").ravel())
    lines = [json.loads(line) for line in (tmp_path / "audit.jsonl").read_text().splitlines()]
    assert [(line["verdict"], line["outcome"]) for line in lines] == [
        ("passed", "done"),
        ("flagged", "blurred"),
        ("flagged", "blurred"),
    ]
    assert 'excise_filter_verdicts_total{verdict="flagged"} 2.0' in metrics


def test_flagged_images_are_refused(tmp_path: Path) -> None:
    images, tensors, _ = ask("refuse", OddFilter(made(2)), tmp_path)
    assert (images.status_code, images.json()["error"]["code"]) == (400, "content_policy_violation")
    assert (tensors.status_code, set(tensors.json())) == (400, {"error"})
    lines = [json.loads(line) for line in (tmp_path / "audit.jsonl").read_text().splitlines()]
    assert [(line["verdict"], line["status"]) for line in lines] == [
        ("passed", 400),
        ("flagged", 400),
        ("flagged", 400),
    ]


def test_no_image_leaves_a_broken_filter(tmp_path: Path) -> None:
    images, tensors, _ = ask("blur", BrokenFilter(), tmp_path)
    assert (images.status_code, tensors.status_code) == (500, 500)


def test_a_filter_that_was_not_asked_for_is_not_used(tmp_path: Path) -> None:
    assert ask("none", BrokenFilter(), tmp_path)[0].status_code == 200


def test_filtered_runtime() -> None:
    class Two:
        name = "two"

        def generate(self, requests: Sequence[Request], **_: Any) -> Any:
            return np.stack([made(request.seed) for request in requests])

    runtime = FilteredRuntime(Two(), OddFilter(made(2)))
    images = runtime.generate([Request("a", seed=1), Request("a", seed=2)])
    np.testing.assert_array_equal(images[0], made(1))
    assert not images[1].any()
    assert (runtime.name, runtime.seen, runtime.flagged) == ("two + odd filter", 2, 1)


def test_a_blur_hides_and_keeps_the_colours() -> None:
    image = np.random.default_rng(0).integers(0, 256, (96, 64, 3), np.uint8)
    blurred = hidden(image, "blur")
    assert blurred.shape == image.shape
    assert blurred.std() < image.std() / 10
    assert abs(float(blurred.mean()) - float(image.mean())) < 2
    assert not hidden(image, "blank").any()


def test_nudenet_sees_as_it_does_in_a_file(tmp_path: Path) -> None:
    """A face stands in for what is hidden: the scores are those of the package on the same image as a file."""
    nudenet = pytest.importorskip("nudenet")
    data = pytest.importorskip("skimage.data")
    image = data.astronaut()
    Image.fromarray(image).save(tmp_path / "image.png")
    boxes = nudenet.NudeDetector().detect(str(tmp_path / "image.png"))
    (face,) = (box for box in boxes if box["class"] == "FACE_FEMALE")
    (verdict,) = NudeNetFilter(labels=["FACE_FEMALE"]).verdicts([image])
    assert verdict.labels == ("FACE_FEMALE",)
    assert verdict.score == pytest.approx(face["score"], abs=1e-6)
    assert not NudeNetFilter(labels=["FACE_FEMALE"], score=0.99).verdicts([image])[0].flagged
    assert not NudeNetFilter(labels=HIDDEN).verdicts([image])[0].flagged
