"""Which networks a protocol needs, where they come from, and what is said of one that isn't there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from excise.errors import ModelError, UsageError
from excise.eval.protocol_file import ProtocolFile, bundled, load_protocol
from excise.eval.protocol_models import KNOWN, ProtocolModels
from excise.eval.protocol_schema import Detector, Metric

BASE: dict[str, Any] = {
    "format": 1,
    "name": "p",
    "version": 1,
    "title": "P",
    "prompts": {"source": "builtin", "builtin": "demo-objects"},
    "groups": {"erased": ["gun"]},
}


def protocol(**fields: Any) -> ProtocolFile:
    return ProtocolFile.model_validate({**BASE, **fields})


def test_every_bundled_protocol_names_what_it_needs() -> None:
    needed = {one.name: ProtocolModels({}).needed(one) for one in bundled()}
    assert needed == {
        "artists-famous": ("alexnet", "clip-vit-base-patch32"),
        "artists-modern": ("alexnet", "clip-vit-base-patch32"),
        "coco-30k": ("clip-vit-base-patch32", "inception"),
        "demo-artist": (),
        "demo-object": (),
        "demo-weapons": (),
        "i2p-all": ("q16", "clip-vit-large-patch14", "clip-vit-base-patch32"),
        "i2p-nudity": ("clip-vit-base-patch32",),
        "imagenette-objects": ("resnet50", "clip-vit-base-patch32"),
        "nudity-142": (),
    }
    assert set().union(*needed.values()) < set(KNOWN)


def test_a_missing_model_is_named_with_what_to_give() -> None:
    with pytest.raises(
        UsageError, match=r"coco-30k needs the model clip-vit-base-patch32: give --model clip-vit-base-"
    ):
        ProtocolModels({}).check([load_protocol("coco-30k")])
    with pytest.raises(UsageError, match=r"needs the model inception: give --model inception=PATH \(the Inception of"):
        ProtocolModels({"clip-vit-base-patch32": Path("/")}).check([load_protocol("coco-30k")])
    own = protocol(detectors=[{"name": "nudenet", "version": "3", "model": "640m"}])
    with pytest.raises(UsageError, match=r"p needs the model 640m: give --model 640m=PATH \(its file or folder\)"):
        ProtocolModels({}).check([own])


def test_a_place_that_nobody_needs_is_refused() -> None:
    with pytest.raises(UsageError, match="--model resnet50=/no/where: there is no such file or folder"):
        ProtocolModels({"resnet50": Path("/no/where")})
    with pytest.raises(
        UsageError, match="--model resnet: no protocol of this run has such a model: did you mean resnet50"
    ):
        ProtocolModels({"resnet": Path("/")}).check([protocol()])
    with pytest.raises(UsageError, match="--model demo:clip: no protocol of this run has such a model"):
        ProtocolModels({"demo:clip": Path("/")}).check([load_protocol("demo-weapons")])
    # One that another protocol needs does no harm.
    ProtocolModels({"resnet50": Path("/")}).check([load_protocol("demo-weapons")])


@pytest.mark.parametrize(
    ("metrics", "message"),
    [
        ([{"name": "clip_score"}], "p, metric clip_score: name the CLIP that scores"),
        ([{"name": "clip_score", "model": "demo:clip"}] * 2, "two figures are named clip_score"),
        (
            [{"name": "clip_score", "model": "demo:clip", "groups": [group]} for group in ("erased", "kept")],
            "p has two metrics clip_score",
        ),
        ([{"name": "clip_score", "model": "demo:clip", "variants": ["a"]}], "clip_score: variants is for lpips"),
        ([{"name": "psnr", "against": ["base"], "model": "demo:clip"}], "psnr: it takes no model, and demo:clip is"),
        ([{"name": "lpips", "against": ["base"]}], "p, metric lpips: say at which sizes"),
        (
            [{"name": "lpips", "against": ["base"], "variants": ["big"]}],
            "lpips: 'big' is no size: give native, or pixels",
        ),
    ],
)
def test_a_metric_that_cannot_be_computed_is_refused_before_anything_runs(
    metrics: list[dict[str, Any]], message: str, tmp_path: Path
) -> None:
    with pytest.raises(Exception, match=message) as caught:
        ProtocolModels({"alexnet": tmp_path}).check([protocol(metrics=metrics)])
    assert isinstance(caught.value, UsageError | ValueError)


def test_networks_are_opened_once_and_their_fingerprints_told() -> None:
    models, demo = ProtocolModels({}), load_protocol("demo-weapons")
    prints = models.open(demo)
    clip = models.clip("demo:clip")
    assert models.clip("demo:clip") is clip
    assert models.extractor(Metric(name="fid", model="demo:clip", against=("base",))) is clip
    assert prints == {"demo:clip": clip.fingerprint.model_dump()}
    nudity = load_protocol("nudity-142")
    # Another protocol's networks aren't this one's.
    assert [name.split()[0] for name in models.open(nudity)] == ["NudeNet"]
    assert models.open(demo) == prints
    assert "BELLY_EXPOSED" in models.detector(nudity.detectors[0]).labels


def test_a_broken_file_is_found_when_the_networks_are_opened(tmp_path: Path) -> None:
    (tmp_path / "broken").write_bytes(b"nothing")
    places = dict.fromkeys(("resnet50", "alexnet", "inception", "clip-vit-base-patch32", "320n"), tmp_path / "broken")
    models = ProtocolModels(places)
    for wrong in (
        protocol(detectors=[{"name": "classifier", "version": "IMAGENET1K_V2", "model": "resnet50"}]),
        protocol(detectors=[{"name": "nudenet", "version": "3", "model": "320n"}]),
        protocol(metrics=[{"name": "lpips", "against": ["base"], "variants": ["64"]}]),
        protocol(metrics=[{"name": "fid", "against": ["base"]}]),
        protocol(metrics=[{"name": "clip_score", "model": "clip-vit-base-patch32"}]),
    ):
        models.check([wrong])
        with pytest.raises(ModelError, match="broken"):
            models.open(wrong)


def test_a_size_that_alexnet_cannot_read(tmp_path: Path) -> None:
    models = ProtocolModels({"alexnet": tmp_path})
    with pytest.raises(UsageError, match="LPIPS needs images of at least 31 × 31, not 16"):
        models.open(protocol(metrics=[{"name": "lpips", "against": ["base"], "variants": ["16"]}]))


def test_an_onnx_classifier_takes_the_labels_beside_it(tmp_path: Path) -> None:
    (tmp_path / "net.onnx").write_bytes(b"")
    chosen = Detector(name="classifier", version="1", model="mine")
    with pytest.raises(ModelError, match=r"labels\.txt is missing"):
        ProtocolModels({"mine": tmp_path / "net.onnx"}).detector(chosen)
