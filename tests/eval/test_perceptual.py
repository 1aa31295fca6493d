"""LPIPS beside the library's own class with the same random trunk, and PSNR by its definition."""

from __future__ import annotations

import warnings
from pathlib import Path

import cv2
import lpips
import numpy as np
import numpy.typing as npt
import pytest
import torch
from torchvision.models import alexnet

from excise.errors import ModelError, UsageError
from excise.eval.perceptual import TRUNK, Lpips, psnr

Pixels = npt.NDArray[np.uint8]


def noisy(images: Pixels, amplitude: int, seed: int) -> Pixels:
    noise = np.random.default_rng(seed).integers(-amplitude, amplitude, images.shape, endpoint=True)
    return np.clip(images + noise, 0, 255).astype(np.uint8)


@pytest.fixture(scope="module")
def images() -> Pixels:
    """Smooth, so that noise shows: random grids of 8 × 8, enlarged to 96 × 96."""
    grids = np.random.default_rng(0).integers(0, 256, (7, 8, 8, 3), np.uint8)
    return np.stack([cv2.resize(grid, (96, 96)) for grid in grids]).astype(np.uint8)


@pytest.fixture(scope="module")
def trunk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with torchvision's AlexNet, random: only its convolutions, which are all that LPIPS reads."""
    folder = tmp_path_factory.mktemp("trunk")
    torch.manual_seed(0)
    weights = alexnet(weights=None).state_dict()
    torch.save({name: value for name, value in weights.items() if name.startswith("features.")}, folder / TRUNK)
    return folder


@pytest.fixture(scope="module")
def shrunk(trunk: Path) -> Lpips:
    return Lpips(trunk, batch_size=4)


@pytest.fixture(scope="module")
def native(trunk: Path) -> Lpips:
    return Lpips(trunk, size=None, batch_size=4)


@pytest.fixture(scope="module")
def library(trunk: Path) -> torch.nn.Module:
    """``lpips.LPIPS`` with that trunk, its weights set one by one."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=UserWarning)
        network: torch.nn.Module = lpips.LPIPS(net="alex", version="0.1", pnet_rand=True, verbose=False)
    stored = torch.load(trunk / TRUNK, weights_only=True)
    for part, layer in ((1, 0), (2, 3), (3, 6), (4, 8), (5, 10)):
        convolution = network.get_submodule(f"net.slice{part}.{layer}")
        convolution.weight.data = stored[f"features.{layer}.weight"]
        convolution.bias.data = stored[f"features.{layer}.bias"]
    return network.eval()


def by_library(network: torch.nn.Module, first: Pixels, second: Pixels, size: int | None) -> list[float]:
    """Pair by pair, as the RECE repository's script has it: OpenCV's resize, then ``lpips.im2tensor``."""
    values = []
    for pair in zip(first, second, strict=True):
        tensors = [lpips.im2tensor(image if size is None else cv2.resize(image, (size, size))) for image in pair]
        with torch.no_grad():
            values.append(network(*tensors).item())
    return values


@pytest.mark.parametrize("size", [64, None])
def test_lpips_is_the_librarys_own(
    shrunk: Lpips, native: Lpips, library: torch.nn.Module, images: Pixels, size: int | None
) -> None:
    others = noisy(images, 60, 1)
    ours = (shrunk if size else native).distances(images, others)
    assert ours.shape == (7,)
    assert ours.min() > 1e-3
    # Measured: 1.5e-8, of distances between 0.01 and 0.03.
    np.testing.assert_allclose(ours, by_library(library, images, others, size), atol=2e-7)


def test_shrinking_changes_the_distance(shrunk: Lpips, native: Lpips, images: Pixels) -> None:
    others = noisy(images, 60, 1)
    assert np.abs(shrunk.distances(images, others) - native.distances(images, others)).min() > 1e-4


def test_an_image_is_at_no_distance_from_itself_and_noise_grows(shrunk: Lpips, images: Pixels) -> None:
    assert shrunk.distances(images, images).max() == 0
    little, much = (shrunk.distances(images, noisy(images, amplitude, 2)) for amplitude in (8, 60))
    assert (little > 0).all()
    assert (little < much).all()
    np.testing.assert_allclose(shrunk.distances(noisy(images, 60, 2), images), much, atol=1e-7)


def test_a_distance_hardly_depends_on_the_batch(trunk: Path, shrunk: Lpips, images: Pixels) -> None:
    others = noisy(images, 30, 3)
    whole = shrunk.distances(images, others)
    alone = [shrunk.distances(images[i : i + 1], others[i : i + 1])[0] for i in range(7)]
    # Measured: 1e-9, since PyTorch's mean over an image depends on where in the batch it lies; with another batch
    # size 1e-8.
    np.testing.assert_allclose(alone, whole, rtol=0, atol=1e-8)
    np.testing.assert_allclose(Lpips(trunk, batch_size=1).distances(images, others), whole, rtol=0, atol=1e-7)


def test_images_of_several_sizes_are_shrunk_to_one(shrunk: Lpips, native: Lpips, images: Pixels) -> None:
    first = [images[0], images[1][:50], images[2]]
    second = [noisy(image, 20, 4) for image in first]
    alone = shrunk.distances(first[1:2], second[1:2])[0]
    assert shrunk.distances(first, second)[1] == pytest.approx(alone, abs=1e-8)
    with pytest.raises(UsageError, match="images of one size"):
        native.distances(first, second)


def test_the_name_says_whose_trunk_it_is(shrunk: Lpips, native: Lpips) -> None:
    assert shrunk.name.startswith("LPIPS (AlexNet 0.1, trunk alexnet-owt-7be5be79 ")
    assert shrunk.name.endswith(", 64 × 64)")
    assert native.name.endswith(", native)")
    assert native.fingerprint.weights == shrunk.fingerprint.weights
    assert native.fingerprint != shrunk.fingerprint


def test_the_published_trunk_has_the_plain_name(trunk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("excise.eval.perceptual.hash_file", lambda _file: "7be5be79" + 56 * "0")
    state = torch.get_rng_state()
    assert Lpips(trunk).name == "LPIPS (AlexNet 0.1, 64 × 64)"
    # The library builds its trunk with random numbers: none of them are the caller's.
    assert torch.equal(torch.get_rng_state(), state)


def test_bad_trunks_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=f"put torchvision's AlexNet weights, {TRUNK}, there"):
        Lpips(tmp_path)
    (tmp_path / TRUNK).write_bytes(b"not weights")
    with pytest.raises(ModelError, match="doesn't hold AlexNet's weights"):
        Lpips(tmp_path)
    torch.save({"features.0.weight": torch.zeros(2)}, tmp_path / TRUNK)
    with pytest.raises(ModelError, match="doesn't hold AlexNet's weights"):
        Lpips(tmp_path)


def test_bad_pairs_are_refused(trunk: Path, native: Lpips, images: Pixels) -> None:
    with pytest.raises(UsageError, match="needs pairs, not 7 and 6 images"):
        native.distances(images, images[:6])
    with pytest.raises(UsageError, match="at least 31 × 31, not 30"):
        Lpips(trunk, size=30)
    with pytest.raises(UsageError, match="at least 31 × 31"):
        native.distances(images[:, :20], images[:, :20])
    with pytest.raises(UsageError, match=r"one size, not \(96, 96\) and \(90, 96\)"):
        native.distances(images, images[:, :90])
    with pytest.raises(UsageError, match="uint8 with shape"):
        native.distances(images.astype(np.float32), images)  # type: ignore[arg-type]
    assert native.distances(images[:0], images[:0]).shape == (0,)


def test_psnr_is_its_definition(images: Pixels) -> None:
    others = noisy(images, 9, 5)
    by_hand = [10 * np.log10(255**2 / np.mean((a.astype(float) - b) ** 2)) for a, b in zip(images, others, strict=True)]
    np.testing.assert_allclose(psnr(images, others), by_hand, rtol=1e-13)
    np.testing.assert_allclose(
        psnr(images, others), [lpips.psnr(a, b) for a, b in zip(images, others, strict=True)], rtol=1e-13
    )
    # One grey level everywhere is a mean squared difference of 1: 20 log₁₀ 255 dB.
    grey = np.full((1, 5, 6, 3), 100, np.uint8)
    assert psnr(grey, grey + 1)[0] == pytest.approx(48.1308036086791, rel=1e-14)
    # From black to white and back: uint8 must not wrap around.
    assert psnr(np.zeros((1, 2, 2, 3), np.uint8), np.full((1, 2, 2, 3), 255, np.uint8))[0] == 0


def test_psnr_of_equal_images_is_infinite(images: Pixels) -> None:
    values = psnr(list(images), [images[0], *noisy(images[1:], 3, 6)])
    assert np.isposinf(values[0])
    assert np.isfinite(values[1:]).all()


def test_psnr_needs_pairs(images: Pixels) -> None:
    with pytest.raises(UsageError, match="needs pairs, not 7 and 2"):
        psnr(images, images[:2])
    with pytest.raises(UsageError, match="one size"):
        psnr(images, images[:, :90])
