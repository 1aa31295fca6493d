"""Inception's features through clean-fid's own path, with a random network in place of the published one."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from cleanfid.fid import compute_fid, get_folder_features
from cleanfid.inception_torchscript import InceptionV3W
from PIL import Image

from excise.errors import ModelError, UsageError
from excise.eval.distribution_distance import frechet_distance, frechet_of_features
from excise.eval.feature_extractor import distance_name
from excise.eval.feature_statistics import FeatureStatistics, StatisticsFitter, extract_statistics
from excise.eval.inception import WEIGHTS, InceptionExtractor

NARROW = 12


class Network(torch.nn.Module):
    """A few random layers from 299 × 299 to ``width`` features, in the attributes of the published network."""

    def __init__(self, width: int = 2048, convolutions: int = 1, logits: int = 10) -> None:
        super().__init__()
        self.layers = torch.nn.Sequential(
            torch.nn.Conv2d(3, 8, 23, 23),
            *(torch.nn.Conv2d(8, 8, 1) for _ in range(convolutions - 1)),
            torch.nn.AdaptiveAvgPool2d(5),
            torch.nn.Flatten(),
            torch.nn.Linear(200, width),
        )
        self.output = torch.nn.Linear(2048, logits)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x)  # type: ignore[no-any-return]


def save(path: Path, network: torch.nn.Module) -> Path:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r".*torch\.jit", FutureWarning)
        torch.jit.save(torch.jit.script(network), path)
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random network under the published file's name."""
    folder = tmp_path_factory.mktemp("inception")
    torch.manual_seed(0)
    save(folder / WEIGHTS, Network())
    return folder


@pytest.fixture(scope="module")
def extractor(folder: Path) -> InceptionExtractor:
    return InceptionExtractor(folder, batch_size=8)


@pytest.fixture(scope="module")
def images() -> list[npt.NDArray[np.uint8]]:
    """Of two sizes, one larger than the network reads."""
    rng = np.random.default_rng(0)
    shapes = [(64, 64, 3), (48, 80, 3)] * 9 + [(310, 330, 3)] * 2
    return [rng.integers(rng.integers(1, 100), rng.integers(101, 256), shape, np.uint8) for shape in shapes]


@pytest.fixture(scope="module")
def cleanfid_network(folder: Path) -> Callable[[torch.Tensor], torch.Tensor]:
    """As clean-fid builds it, but for the download."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r".*torch\.jit\.load", FutureWarning)
        return InceptionV3W(str(folder), download=False, resize_inside=False).eval()


def write(folder: Path, images: list[npt.NDArray[np.uint8]]) -> Path:
    folder.mkdir()
    for number, image in enumerate(images):
        Image.fromarray(image).save(folder / f"{number:03}.png")
    return folder


def test_features_are_clean_fids_own(
    tmp_path: Path,
    extractor: InceptionExtractor,
    images: list[npt.NDArray[np.uint8]],
    cleanfid_network: Callable[[torch.Tensor], torch.Tensor],
) -> None:
    theirs = get_folder_features(
        str(write(tmp_path / "images", images)),
        cleanfid_network,
        num_workers=0,
        batch_size=8,
        device=torch.device("cpu"),
        mode="clean",
        verbose=False,
    )
    ours = extractor.image_features(images)
    assert (ours.shape, ours.dtype) == ((20, 2048), np.float32)
    assert ours.std(0).max() > 0.01
    # The same arrays reach the same network, but for the last batch, which is smaller there. Measured: not one bit.
    assert np.array_equal(ours[:16], theirs[:16])
    np.testing.assert_allclose(ours, theirs, atol=1e-6)


def test_the_distance_of_two_folders_is_clean_fids_end_result(
    tmp_path: Path,
    extractor: InceptionExtractor,
    images: list[npt.NDArray[np.uint8]],
    cleanfid_network: Callable[[torch.Tensor], torch.Tensor],
) -> None:
    others = [255 - image for image in images[::-1]]
    # The first features only: of 2048 clean-fid's matrix root takes half a minute.
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The `disp` argument is deprecated", DeprecationWarning)
        expected = compute_fid(
            str(write(tmp_path / "a", images)),
            str(write(tmp_path / "b", others)),
            custom_feat_extractor=lambda batch: cleanfid_network(batch)[:, :NARROW],
            num_workers=0,
            batch_size=8,
            device=torch.device("cpu"),
            verbose=False,
            use_dataparallel=False,
        )
    ours, theirs = (extractor.image_features(each)[:, :NARROW] for each in (images, others))

    def fitted(rows: npt.NDArray[np.float32]) -> FeatureStatistics:
        fitter = StatisticsFitter(extractor.fingerprint, NARROW)
        fitter.add(rows)
        return fitter.statistics()

    assert expected > 0.05
    # Measured: 9e-10, since clean-fid's means are float32, and 1e-6 for the grid of the statistics.
    assert frechet_of_features(ours, theirs) == pytest.approx(expected, abs=1e-7)
    assert frechet_distance(fitted(ours), fitted(theirs)) == pytest.approx(expected, abs=1e-5)


def test_an_images_features_do_not_depend_on_its_company(
    extractor: InceptionExtractor, images: list[npt.NDArray[np.uint8]], folder: Path
) -> None:
    whole = extractor.image_features(images)
    order = np.random.default_rng(1).permutation(len(images))
    # Measured: not one bit, with batches of one shape. Batches of another shape move features by up to 2e-7.
    assert np.array_equal(extractor.image_features([images[i] for i in order]), whole[order])
    assert np.array_equal(np.concatenate([extractor.image_features([image]) for image in images]), whole)
    np.testing.assert_allclose(InceptionExtractor(folder, batch_size=3).image_features(images), whole, atol=2e-6)
    assert np.array_equal(InceptionExtractor(folder, batch_size=8, threads=1).image_features(images), whole)


def test_statistics_of_shards_are_the_wholes(
    extractor: InceptionExtractor, images: list[npt.NDArray[np.uint8]]
) -> None:
    whole = extract_statistics(extractor, [images])
    shards = extract_statistics(extractor, [images[13:]]) + extract_statistics(extractor, [images[:6], images[6:13]])
    assert shards.count == whole.count == 20
    assert np.array_equal(shards.outer, whole.outer)
    assert np.array_equal(shards.total, whole.total)


def test_no_images_have_no_features(extractor: InceptionExtractor) -> None:
    assert extractor.image_features([]).shape == (0, 2048)
    with pytest.raises(UsageError, match="uint8 with shape"):
        extractor.image_features([np.zeros((4, 4), np.uint8)])


def test_only_the_published_network_gives_the_plain_name(tmp_path: Path, extractor: InceptionExtractor) -> None:
    assert extractor.name.startswith("inception-2015-12-05 ")
    assert extractor.name.endswith(extractor.fingerprint.weights[:8])
    assert distance_name("FID", extractor.name) == f"FID (features of {extractor.name})"
    published = InceptionExtractor(save(tmp_path / WEIGHTS, Network(convolutions=94, logits=1008)))
    assert distance_name("FID", published.name) == "FID"
    assert published.fingerprint.weights != extractor.fingerprint.weights


def test_a_missing_file_says_where_to_put_it(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=rf"put {WEIGHTS}, the TorchScript file that clean-fid uses, there"):
        InceptionExtractor(tmp_path)
    with pytest.raises(ModelError, match="is not Inception's weights"):
        InceptionExtractor(tmp_path / WEIGHTS)
    (tmp_path / "other.pt").write_bytes(b"")
    with pytest.raises(ModelError, match=r"other\.pt is not Inception's weights"):
        InceptionExtractor(tmp_path / "other.pt")


def test_other_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / WEIGHTS).write_bytes(b"not a network")
    with pytest.raises(ModelError, match="is not a TorchScript network"):
        InceptionExtractor(tmp_path)
    save(tmp_path / WEIGHTS, torch.nn.Linear(2, 2))
    with pytest.raises(ModelError, match="is not a TorchScript network"):
        InceptionExtractor(tmp_path)
    save(tmp_path / WEIGHTS, Network(width=64))
    with pytest.raises(ModelError, match="doesn't turn images of 299 × 299 into 2048 features"):
        InceptionExtractor(tmp_path).image_features([np.zeros((8, 8, 3), np.uint8)])
