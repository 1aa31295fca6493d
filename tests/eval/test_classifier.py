"""torchvision's own models and transforms as oracle, on random weights; ONNX and probes against the same arithmetic."""

from __future__ import annotations

import json
import pickle
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import pytest
import torch
from PIL import Image
from safetensors.numpy import save_file
from safetensors.torch import save_file as save_tensors
from skimage import data
from torchvision.models import ResNet18_Weights, ResNet50_Weights, resnet18

from excise.errors import ModelError, UsageError
from excise.eval.classifier import Classifier, read_labels
from excise.eval.feature_extractor import Fingerprint, Images
from excise.eval.feature_probe import SCALE, feature_probe
from excise.eval.onnx_classifier import Preprocessing, onnx_classifier
from excise.eval.recognition import check_labels, hits, seen, tally
from excise.eval.torchvision_classifier import torchvision_classifier

IMAGENETTE = (
    "tench",
    "English springer",
    "cassette player",
    "chain saw",
    "church",
    "French horn",
    "garbage truck",
    "gas pump",
    "golf ball",
    "parachute",
)
ENTRY = ResNet18_Weights.IMAGENET1K_V1


@pytest.fixture(scope="module")
def images() -> list[npt.NDArray[np.uint8]]:
    """Photographs of several sizes, one of them smaller than the network reads."""
    return [data.astronaut(), data.chelsea(), data.coffee(), data.rocket(), data.astronaut()[60:200, 150:300]]


@pytest.fixture(scope="module")
def network() -> torch.nn.Module:
    torch.manual_seed(0)
    return resnet18(weights=None).eval()


@pytest.fixture(scope="module")
def folder(network: torch.nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The network's weights as .pth and .safetensors, itself as ONNX, and its labels."""
    made = tmp_path_factory.mktemp("classifier")
    torch.save(network.state_dict(), made / "weights.pth")
    save_tensors(network.state_dict(), made / "weights.safetensors")
    (made / "labels.txt").write_text("\n".join(ENTRY.meta["categories"]), encoding="utf-8")
    for name, axes in (("free", {"images": {0: "n"}}), ("fixed", None)):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the exporter's own, about which exporter it is
            torch.onnx.export(
                network,
                (torch.zeros(2, 3, 224, 224),),
                made / f"{name}.onnx",
                input_names=["images"],
                dynamic_axes=axes,
                dynamo=False,
            )
    return made


@pytest.fixture(scope="module")
def expected(network: torch.nn.Module, images: list[npt.NDArray[np.uint8]]) -> npt.NDArray[np.float32]:
    """torchvision's own model on torchvision's own transforms, image by image."""
    transform = ENTRY.transforms()
    with torch.inference_mode():
        rows = [network(transform(Image.fromarray(image))[None]) for image in images]
    return torch.cat(rows).numpy()


@pytest.fixture(scope="module")
def classifier(folder: Path) -> Classifier:
    return torchvision_classifier(folder / "weights.pth", "resnet18", entry="IMAGENET1K_V1", batch_size=2)


def test_logits_are_torchvisions_own(
    classifier: Classifier, images: list[npt.NDArray[np.uint8]], expected: npt.NDArray[np.float32]
) -> None:
    # Logits span 8.2. Measured: 9.5e-7 (a batch of 2 beside one of 1).
    assert np.abs(classifier.logits(images) - expected).max() < 1e-5
    assert np.abs(expected[0] - expected[1]).max() > 0.01  # the images do differ to this network


def test_observations_are_the_best_labels_with_their_probabilities(
    classifier: Classifier, images: list[npt.NDArray[np.uint8]], expected: npt.NDArray[np.float32]
) -> None:
    values, indices = torch.tensor(expected).double().softmax(1).topk(5)
    for one, value, index in zip(classifier.observe(images), values, indices, strict=True):
        assert list(one) == ["labels", "probabilities"]
        assert one["labels"] == [ENTRY.meta["categories"][number] for number in index]
        # Measured: 1.9e-8, from the logits.
        assert np.abs(np.array(one["probabilities"]) - value.numpy()).max() < 2e-7
        assert json.loads(json.dumps(one, allow_nan=False)) == one


def test_a_cut_of_the_images_does_not_show(classifier: Classifier, images: list[npt.NDArray[np.uint8]]) -> None:
    whole = classifier.observe(images)
    assert classifier.observe(images[:3]) + classifier.observe(images[3:]) == whole
    assert classifier.observe([]) == []


def test_safetensors_hold_the_same_network(
    classifier: Classifier, folder: Path, images: list[npt.NDArray[np.uint8]]
) -> None:
    other = torchvision_classifier(folder / "weights.safetensors", "resnet18", entry="IMAGENET1K_V1", batch_size=2)
    assert np.array_equal(other.logits(images[:2]), classifier.logits(images[:2]))
    assert other.fingerprint.weights != classifier.fingerprint.weights


@pytest.mark.parametrize("kind", ["free", "fixed"])
def test_an_onnx_export_sees_the_same_classes(
    folder: Path,
    images: list[npt.NDArray[np.uint8]],
    classifier: Classifier,
    expected: npt.NDArray[np.float32],
    kind: str,
) -> None:
    other = onnx_classifier(folder / f"{kind}.onnx", folder / "labels.txt", batch_size=3, threads=1)
    # Measured: 2.1e-6. The sixth label is at least 0.0096 away from the fifth.
    assert np.abs(other.logits(images) - expected).max() < 2e-5
    ours, theirs = other.observe(images), classifier.observe(images)
    assert [one["labels"] for one in ours] == [one["labels"] for one in theirs]


def test_the_default_preprocessing_is_torchvisions_first_one(images: list[npt.NDArray[np.uint8]]) -> None:
    transform, oracle = Preprocessing().transform(), ResNet50_Weights.IMAGENET1K_V1.transforms()
    other = ResNet50_Weights.IMAGENET1K_V2.transforms()
    for image in images:
        assert np.array_equal(transform(image), oracle(Image.fromarray(image)).numpy())
        assert not np.array_equal(transform(image), other(Image.fromarray(image)).numpy())


def test_a_published_file_is_known_by_its_hash(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from excise.eval import torchvision_classifier as module

    first, second = ResNet50_Weights.IMAGENET1K_V1, ResNet50_Weights.IMAGENET1K_V2
    published = {first: "0676ba61", second: "11ad3fa6"}  # of torchvision's resnet50-HASH.pth
    entries = ResNet50_Weights.__members__
    for entry, start in published.items():
        assert entry.url.endswith(f"resnet50-{start}.pth")
        assert module._entry(folder / "weights.pth", start + "0" * 56, entries, None) == entry.name
    with pytest.raises(UsageError, match="holds IMAGENET1K_V1, not IMAGENET1K_V2"):
        module._entry(folder / "weights.pth", published[first] + "0" * 56, entries, "IMAGENET1K_V2")
    with pytest.raises(UsageError, match=r"name the entry .* IMAGENET1K_V1, IMAGENET1K_V2"):
        torchvision_classifier(folder / "weights.pth")


def test_imagenettes_classes_are_labels_of_the_network(classifier: Classifier) -> None:
    check_labels(IMAGENETTE, classifier.labels)
    with pytest.raises(UsageError, match="'church bell'"):
        check_labels(("church", "church bell"), classifier.labels)


def test_missing_weights_say_which_file_goes_where(tmp_path: Path) -> None:
    with pytest.raises(
        ModelError, match=r"resnet50\.pth is missing: .*resnet50-11ad3fa6\.pth .* nothing is downloaded"
    ):
        torchvision_classifier(tmp_path / "resnet50.pth", entry="IMAGENET1K_V2")
    with pytest.raises(ModelError, match=r"net\.onnx is missing"):
        onnx_classifier(tmp_path / "net.onnx", tmp_path / "labels.txt")
    assert not list(tmp_path.iterdir())


class Trap:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.target,)


def test_a_pickle_is_never_run(tmp_path: Path) -> None:
    (tmp_path / "weights.pth").write_bytes(pickle.dumps(Trap(tmp_path / "ran")))
    torch.save({"weight": Trap(tmp_path / "ran")}, tmp_path / "zip.pth")
    for name in ("weights.pth", "zip.pth"):
        with pytest.raises(ModelError, match="read safely"):
            torchvision_classifier(tmp_path / name, "resnet18", entry="IMAGENET1K_V1")
    assert not (tmp_path / "ran").exists()


def test_weights_that_do_not_fit_are_refused(folder: Path, network: torch.nn.Module, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="doesn't hold the weights of resnet34"):
        torchvision_classifier(folder / "weights.pth", "resnet34", entry="IMAGENET1K_V1")
    (tmp_path / "labels.txt").write_text("yes\nno\n")
    with pytest.raises(ModelError, match="with these labels"):
        torchvision_classifier(
            folder / "weights.pth", "resnet18", entry="IMAGENET1K_V1", labels=tmp_path / "labels.txt"
        )
    torch.save({"state_dict": network.state_dict()}, tmp_path / "nested.pth")
    with pytest.raises(ModelError, match="holds no state dict"):
        torchvision_classifier(tmp_path / "nested.pth", "resnet18", entry="IMAGENET1K_V1")
    (tmp_path / "text.safetensors").write_text("no weights")
    with pytest.raises(ModelError, match="read safely"):
        torchvision_classifier(tmp_path / "text.safetensors", "resnet18", entry="IMAGENET1K_V1")
    with pytest.raises(UsageError, match="resnet18x"):
        torchvision_classifier(folder / "weights.pth", "resnet18x")
    with pytest.raises(UsageError, match="IMAGENET1K_V9"):
        torchvision_classifier(folder / "weights.pth", "resnet18", entry="IMAGENET1K_V9")


def test_logits_that_are_not_finite_are_an_error(network: torch.nn.Module, tmp_path: Path) -> None:
    state = dict(network.state_dict())
    state["fc.bias"] = torch.full_like(state["fc.bias"], float("inf"))
    torch.save(state, tmp_path / "overflow.pth")
    broken = torchvision_classifier(tmp_path / "overflow.pth", "resnet18", entry="IMAGENET1K_V1", batch_size=1)
    with pytest.raises(ModelError, match="aren't finite"):
        broken.observe([data.astronaut()])


def test_onnx_models_and_labels_that_do_not_fit_are_refused(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "few.txt").write_text("yes\nno\n")
    with pytest.raises(ModelError, match=r"shape \(1000,\) for 2 labels"):
        onnx_classifier(folder / "free.onnx", tmp_path / "few.txt", batch_size=1).observe([data.astronaut()])
    with pytest.raises(ModelError, match="reads images of 224"):
        onnx_classifier(folder / "free.onnx", folder / "labels.txt", Preprocessing(crop=192))
    model = onnx.load(folder / "free.onnx")
    model.graph.input[0].type.tensor_type.shape.dim[1].dim_value = 1
    onnx.save(model, tmp_path / "grey.onnx")
    with pytest.raises(ModelError, match=r"grey\.onnx"):
        onnx_classifier(tmp_path / "grey.onnx", folder / "labels.txt")
    (tmp_path / "gap.txt").write_text("yes\n\nno\n")
    with pytest.raises(ModelError, match="no label in line 2"):
        read_labels(tmp_path / "gap.txt")
    (tmp_path / "latin.txt").write_bytes("café\nthé\n".encode("latin-1"))
    with pytest.raises(ModelError, match="UTF-8"):
        read_labels(tmp_path / "latin.txt")
    with pytest.raises(UsageError, match="crop of 300"):
        Preprocessing(crop=300)


class Colours:
    """Features that are an image's mean colour, not of unit length."""

    name = "colours"
    dimension = 3
    fingerprint = Fingerprint(name="colours", weights="0" * 64, preprocessing="none")

    def image_features(self, images: Images) -> npt.NDArray[np.float32]:
        return np.array([image.mean((0, 1)) for image in images], np.float32)


def painted(*colours: tuple[int, int, int]) -> list[npt.NDArray[np.uint8]]:
    return [np.full((4, 4, 3), colour, np.uint8) for colour in colours]


def test_a_prompt_probe_takes_the_nearest_embedding_by_cosine(tmp_path: Path) -> None:
    embeddings = np.array([[0, 0, 50], [0.1, 0, 0]], np.float16)  # of any length
    save_file({"embeddings": embeddings}, tmp_path / "q16.safetensors")
    probe = feature_probe(tmp_path / "q16.safetensors", Colours())
    blue, red, mostly_red = probe.observe(painted((0, 0, 9), (200, 0, 0), (101, 0, 100)))
    assert (blue["labels"][0], red["labels"][0]) == ("appropriate", "inappropriate")
    # softmax over 100 cos: by hand for the third, where both are near 1/2 · √2
    norm = np.hypot(101, 100)
    chance = 1 / (1 + np.exp(SCALE * (100 - 101) / norm))
    assert mostly_red["labels"] == ["inappropriate", "appropriate"]
    assert mostly_red["probabilities"][0] == pytest.approx(chance, abs=5e-6)  # measured: 5.8e-7


def test_a_linear_probe_is_its_matrix(tmp_path: Path) -> None:
    save_file(
        {"weight": np.array([[0, 0, 1], [1, 0, 0]], np.float32), "bias": np.array([0, -50], np.float32)},
        tmp_path / "linear.safetensors",
    )
    probe = feature_probe(tmp_path / "linear.safetensors", Colours(), name="linear", labels=("blue", "red"))
    assert probe.logits(painted((40, 0, 10), (90, 7, 10))).tolist() == [[10, -10], [10, 40]]


def test_probes_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"q16\.safetensors is missing: .*\(2, 3\)"):
        feature_probe(tmp_path / "q16.safetensors", Colours())
    for tensors in (
        {"embeddings": np.ones((2, 4), np.float32)},
        {"weight": np.ones((2, 3), np.float32)},
        {"prompts": np.ones((2, 3), np.float32)},
    ):
        save_file(tensors, tmp_path / "other.safetensors")
        with pytest.raises(ModelError, match=r"holds .* a probe of colours"):
            feature_probe(tmp_path / "other.safetensors", Colours())
    save_file({"embeddings": np.zeros((2, 3), np.float32)}, tmp_path / "zero.safetensors")
    with pytest.raises(ModelError, match="length 0"):
        feature_probe(tmp_path / "zero.safetensors", Colours())
    (tmp_path / "pickle.safetensors").write_bytes(pickle.dumps(np.ones((2, 3))))
    with pytest.raises(ModelError, match="no safetensors file"):
        feature_probe(tmp_path / "pickle.safetensors", Colours())


OBSERVED = (
    {"labels": ["church", "tench", "golf ball"], "probabilities": [0.5, 0.3, 0.1]},
    {"labels": ["tench", "church", "golf ball"], "probabilities": [0.5, 0.3, 0.1]},
    {"labels": ["golf ball", "tench", "French horn"], "probabilities": [0.5, 0.3, 0.1]},
    {"labels": ["English springer", "tench", "church"], "probabilities": [0.5, 0.3, 0.1]},
)


def test_top_1_and_top_k_by_class_and_group() -> None:
    labels = ["church", "Church", "golf ball", "English Springer"]
    assert hits(OBSERVED, labels).tolist() == [True, False, True, True]
    assert hits(OBSERVED, labels, top=2).tolist() == [True, True, True, True]
    groups = ["erased", "erased", "kept", "kept"]
    assert {key: (one.hits, one.n, one.value) for key, one in tally(hits(OBSERVED, labels), groups).items()} == {
        "erased": (1, 2, 0.5),
        "kept": (2, 2, 1.0),
    }
    assert seen(OBSERVED[2], ("church", "french horn"), top=3)
    assert not seen(OBSERVED[2], ("church", "french horn"), top=2)


def test_more_than_was_observed_cannot_be_told() -> None:
    with pytest.raises(UsageError, match="top-5 can't be told from the 3"):
        hits(OBSERVED, ["church"] * 4, top=5)
    with pytest.raises(UsageError, match="4 images can't have 3 labels"):
        hits(OBSERVED, ["church"] * 3)
    with pytest.raises(UsageError, match="1 images can't have 2 keys"):
        tally(np.array([True]), ["a", "b"])


def test_a_classifier_needs_labels_to_choose_from() -> None:
    with pytest.raises(UsageError, match="two labels, not 1"):
        Classifier("one", ("church",), Colours.fingerprint, lambda images: np.zeros((len(images), 1), np.float32))
    with pytest.raises(UsageError, match="at least 1 label, not 0"):
        Classifier("none", ("a", "b"), Colours.fingerprint, lambda images: np.zeros((1, 2), np.float32), top=0)
