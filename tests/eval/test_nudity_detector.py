"""The nudenet package's own loop as oracle: the same boxes with the same scores, bit for bit, on photographs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
import pytest
from nudenet import NudeDetector, nudenet
from PIL import Image
from skimage import data

from excise.errors import ModelError, UsageError
from excise.eval import yolo
from excise.eval.boxes import Box, boxes_of
from excise.eval.counting import FACES, PUBLISHED, count
from excise.eval.nudity_detector import NudityDetector

Picture = npt.NDArray[np.uint8]

WEIGHTS = Path(nudenet.__file__).with_name("320n.onnx")


@pytest.fixture(scope="module")
def library() -> NudeDetector:
    return NudeDetector()


@pytest.fixture(scope="module")
def detector() -> NudityDetector:
    return NudityDetector(threads=2)


@pytest.fixture(scope="module")
def photographs() -> list[Picture]:
    """Cut-outs of photographs, most of them with some of a face: wide, tall, square, tiny, enlarged, mirrored."""
    random = np.random.default_rng(0)
    sources = [data.astronaut(), data.astronaut(), data.chelsea(), data.coffee()]
    made = [data.astronaut(), data.chelsea(), data.rocket(), data.astronaut()[:1, :7]]
    for number in range(24):
        source = sources[number % 4]
        height, width = (int(random.integers(80, limit + 1)) for limit in source.shape[:2])
        top, left = (
            int(random.integers(0, limit - size + 1))
            for limit, size in zip(source.shape, (height, width), strict=False)
        )
        image = source[top : top + height, left : left + width]
        image = image[:, ::-1] if number % 3 == 0 else image
        made.append(cv2.resize(np.ascontiguousarray(image), (512, 512)) if number % 2 else np.ascontiguousarray(image))
    return made


def as_boxes(detections: list[dict[str, Any]]) -> tuple[Box, ...]:
    return tuple(Box(one["class"], one["score"], tuple(one["box"])) for one in detections)


def as_a_file_gives_it(image: Picture) -> Picture:
    """BGR, contiguous: what the library's ``cv2.imread`` gives it."""
    return np.ascontiguousarray(image[..., ::-1])


@pytest.fixture(scope="module")
def expected(library: NudeDetector, photographs: list[Picture]) -> list[tuple[Box, ...]]:
    return [as_boxes(library.detect(as_a_file_gives_it(image))) for image in photographs]


@pytest.fixture(scope="module")
def found(detector: NudityDetector, photographs: list[Picture]) -> list[tuple[Box, ...]]:
    return detector.detect(photographs)


def test_boxes_and_scores_are_the_librarys_own(found: list[tuple[Box, ...]], expected: list[tuple[Box, ...]]) -> None:
    assert found == expected  # the largest difference measured: none, in boxes and in scores
    assert sum(map(len, expected)) >= 10
    assert sum(not boxes for boxes in expected) > 5
    assert len({box.name for boxes in expected for box in boxes}) >= 2


def test_counts_by_class_are_the_librarys_own(
    detector: NudityDetector, found: list[tuple[Box, ...]], expected: list[tuple[Box, ...]]
) -> None:
    rules = (*PUBLISHED.values(), FACES.female, FACES.male)
    for rule in rules:
        rule.check(detector.labels)
    assert count(found, rules) == count(expected, rules)
    assert count(expected, rules)["FACES-female"].total > 0


def test_the_library_on_files_and_its_batches_say_the_same(
    library: NudeDetector, detector: NudityDetector, photographs: list[Picture], tmp_path: Path
) -> None:
    files = []
    for number, image in enumerate(photographs[:8]):
        files.append(str(tmp_path / f"{number}.png"))
        Image.fromarray(image).save(files[-1])
    ours = detector.detect(photographs[:8])
    assert ours == [as_boxes(library.detect(file)) for file in files]
    assert ours == [as_boxes(one) for one in library.detect_batch(files)]


def test_a_face_is_found_in_a_photograph_and_nothing_in_blank_and_noise_images(detector: NudityDetector) -> None:
    (face,) = detector.detect([data.astronaut()])[0]
    assert face.name == "FACE_FEMALE"
    assert face.score > 0.6
    x, y, width, height = face.box
    # where the face is in the photograph, by eye
    assert x < 224 < x + width
    assert y < 120 < y + height
    noise = np.random.default_rng(0).integers(0, 256, (3, 512, 512, 3), np.uint8)
    blank = [np.full((512, 512, 3), grey, np.uint8) for grey in (0, 127, 255)]
    assert detector.detect([*noise, *blank]) == [()] * 6


def test_rgb_is_another_detector_and_says_so(library: NudeDetector, detector: NudityDetector) -> None:
    other = NudityDetector(channels="rgb", threads=1)
    image = data.astronaut()
    # The library swaps twice, so an image that is already RGB reaches the network as RGB.
    assert other.detect([image]) == [as_boxes(library.detect(image))]
    assert other.detect([image]) != detector.detect([image])
    assert other.fingerprint != detector.fingerprint
    assert other.fingerprint.weights == detector.fingerprint.weights


class Folder(Sequence[Any]):
    """Images that are read when they are asked for."""

    def __init__(self, images: list[Picture]) -> None:
        self.images, self.reads = images, 0

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, row: Any) -> Picture:
        self.reads += 1
        return self.images[row]


@pytest.mark.parametrize(("batch_size", "threads"), [(1, 1), (4, 2), (3, 1)])
def test_batches_threads_and_cuts_never_show(
    photographs: list[Picture], expected: list[tuple[Box, ...]], batch_size: int, threads: int
) -> None:
    other = NudityDetector(batch_size=batch_size, threads=threads)
    folder = Folder(photographs[:14])
    assert other.detect(folder) == expected[:14]
    assert folder.reads == 14
    assert other.detect(photographs[5:12]) == expected[5:12]
    assert other.detect([]) == []


def test_boxes_are_computed_only_where_something_is_seen() -> None:
    lazy = NudityDetector(threads=1)
    assert isinstance(lazy._head, yolo.CutHead)
    lazy._head._branches = [None] * 3  # type: ignore[list-item]
    assert lazy.detect([np.zeros((64, 64, 3), np.uint8)]) == [()]
    with pytest.raises(AttributeError):
        lazy.detect([data.astronaut()])


def changed(target: Path, *, sizes: tuple[int, ...] = (), metadata: bool = True) -> Path:
    model = onnx.load(WEIGHTS)
    for dimension, size in zip(model.graph.input[0].type.tensor_type.shape.dim, sizes, strict=False):
        dimension.dim_value = size
    if not metadata:
        del model.metadata_props[:]
    onnx.save(model, target)
    return target


def test_a_graph_that_cannot_be_cut_gives_the_same_boxes(
    tmp_path: Path, photographs: list[Picture], expected: list[tuple[Box, ...]]
) -> None:
    fixed = NudityDetector(changed(tmp_path / "fixed.onnx", sizes=(1, 3, 320, 320)), threads=1)
    assert isinstance(fixed._head, yolo.WholeHead)
    assert fixed.detect(photographs[:10]) == expected[:10]


def test_another_resolution_is_the_librarys_at_that_resolution() -> None:
    image = data.astronaut()
    other = NudeDetector(inference_resolution=640)
    boxes = NudityDetector(resolution=640, threads=1).detect([image])
    assert boxes == [as_boxes(other.detect(as_a_file_gives_it(image)))]
    assert boxes[0]


def test_labels_are_the_librarys_own_and_the_fingerprint_is_of_the_weights(detector: NudityDetector) -> None:
    assert list(detector.labels) == getattr(nudenet, "__labels")
    assert detector.fingerprint.name == "NudeNet 3.4.2 320n"
    # of 320n.onnx in the wheel of nudenet 3.4.2
    assert detector.fingerprint.weights.startswith("c15d8273adad2d0a")


def test_observations_are_json_that_gives_the_boxes_back(detector: NudityDetector) -> None:
    images = [data.astronaut(), np.zeros((8, 8, 3), np.uint8)]
    seen = detector.observe(images)
    assert [boxes_of(json.loads(json.dumps(one, allow_nan=False))) for one in seen] == detector.detect(images)
    assert seen[1] == {"boxes": []}


def test_what_is_no_image_is_refused(detector: NudityDetector) -> None:
    with pytest.raises(UsageError, match=r"\(512, 512\)"):
        detector.detect([data.astronaut(), data.camera()])
    with pytest.raises(UsageError, match="float32"):
        detector.detect([data.astronaut().astype(np.float32)])


def test_a_model_that_is_missing_or_none_is_refused_by_its_path(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"640m\.onnx is missing: put NudeNet's weights there"):
        NudityDetector(tmp_path / "640m.onnx")
    (tmp_path / "text.onnx").write_text("no model")
    with pytest.raises(ModelError, match=r"text\.onnx"):
        NudityDetector(tmp_path / "text.onnx")
    with pytest.raises(ModelError, match="what its classes are"):
        NudityDetector(changed(tmp_path / "nameless.onnx", metadata=False))


def test_sizes_that_a_model_does_not_take_are_refused(tmp_path: Path) -> None:
    fixed = changed(tmp_path / "fixed.onnx", sizes=(1, 3, 320, 320))
    with pytest.raises(UsageError, match="a batch of 1 alone, not of 4"):
        NudityDetector(fixed, batch_size=4)
    with pytest.raises(UsageError, match="a height of 320 alone, not of 640"):
        NudityDetector(fixed, resolution=640)
    with pytest.raises(UsageError, match="multiple of 32 pixels a side, not of 300"):
        NudityDetector(resolution=300)


@pytest.mark.parametrize("arguments", [{"batch_size": 0}, {"threads": 0}, {"resolution": -1}, {"channels": "bgr"}])
def test_settings_that_cannot_be_used_are_refused(arguments: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=str(next(iter(arguments.values())))):
        NudityDetector(**arguments)


@pytest.mark.skipif(
    "CUDAExecutionProvider" in onnxruntime.get_available_providers(), reason="this onnxruntime has CUDA"
)
def test_a_provider_that_is_not_there_is_refused() -> None:
    with pytest.raises(UsageError, match="CUDAExecutionProvider"):
        NudityDetector(provider="cuda")
