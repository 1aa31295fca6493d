"""NudeNet 3: boxes of body parts and faces in images, many images at a time.

The ``nudenet`` package (Praneeth, 2024; AGPL-3.0 weights in its wheel) detects 18 classes with a YOLOv8n. Its
``NudeDetector.detect`` takes one file and loops over 2100 anchors in Python. The same boxes, with the same scores, come
from here faster: ``yolo`` computes boxes only where something is seen, and images are spread over cores.

What the package does, and so does this module: the image is padded on the right and below to a square with black,
resized to 320 × 320 (bilinear), divided by 255; anchors with a score of at least 0.2 compete, whatever their class, in
OpenCV's non-maximum suppression (score above 0.25, overlap up to 0.45). Before it, corners that lie outside are moved
to the image's edge, without shrinking the box, and width and height end at the edge; pixels are truncated.

**Colours.** Of a file, nudenet 3.4 hands the network BGR planes: ``cv2.imread`` gives BGR, and red and blue are then
swapped twice. Earlier releases, such as the 3.0 that RECE's published code carries, hand it RGB, as do other YOLOv8
exports. ``channels="library"`` is the installed package on a file, ``"rgb"`` what was meant; scores differ (0.720 and
0.811 of the face in scikit-image's ``astronaut``), so the fingerprint names the order.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from excise.errors import MissingExtra, ModelError, UsageError
from excise.eval.boxes import Box, observation
from excise.eval.feature_extractor import Fingerprint, Images, check_images
from excise.eval.yolo import Array, open_yolo
from excise.manifest import hash_file
from excise.serve.onnx_component import Provider

#: The least score of an anchor, of a box, and the overlap (intersection over union) from which the lower one goes.
ANCHOR_SCORE, BOX_SCORE, OVERLAP = 0.2, 0.25, 0.45

Channels = Literal["library", "rgb"]


class NudityDetector:
    """NudeNet's detector.

    Args:
        model: its ONNX file; None takes ``320n.onnx`` from the installed ``nudenet`` package.
        resolution: pixels a side that the network reads; None takes what the file was exported for.
        batch_size: images in each call of the network. 1 is what the package runs and what is fastest on a CPU.
        threads: images looked at at the same time; None takes one more than there are cores, and one on a GPU.
        provider: ``cpu``, ``cuda`` or ``tensorrt``, of ONNX Runtime.
        channels: see above.

    Raises:
        ModelError: there is no such file, or it is no such detector.
        UsageError: a size or a provider that can't be used.
        MissingExtra: without the libraries of the extra ``eval``.
    """

    def __init__(
        self,
        model: Path | None = None,
        *,
        resolution: int | None = None,
        batch_size: int = 1,
        threads: int | None = None,
        provider: Provider = "cpu",
        channels: Channels = "library",
    ) -> None:
        for name, value in (("resolution", resolution), ("batch_size", batch_size), ("threads", threads)):
            if value is not None and value < 1:
                raise UsageError(f"{name} must be at least 1, not {value}")
        if channels not in ("library", "rgb"):
            raise UsageError(f"channels={channels!r}: choose library or rgb")
        try:
            import cv2  # noqa: F401
        except ImportError as error:
            raise MissingExtra("opencv-python-headless", "eval") from error
        source = _weights(model)
        self._head, self.labels, self._side = open_yolo(
            source, side=resolution, batch_size=batch_size, provider=provider
        )
        self._batch_size, self._channels = batch_size, channels
        # One more than cores: while one thread holds Python's lock, the others compute.
        self._threads = threads or (_cores() + 1 if provider == "cpu" else 1)
        self.name = "NudeNet"  #: as in reports
        order = "as nudenet reads a file (BGR)" if channels == "library" else "RGB"
        self.fingerprint = Fingerprint(
            name=" ".join(("NudeNet", *_version(), source.stem)),
            weights=hash_file(source),
            preprocessing=f"padded to a square, bilinear to {self._side}, x / 255, {order}; "
            f"anchors ≥ {ANCHOR_SCORE}, boxes > {BOX_SCORE}, overlap ≤ {OVERLAP}",
        )

    def detect(self, images: Images) -> list[tuple[Box, ...]]:
        """The boxes of each image, highest score first.

        Args:
            images: uint8 RGB with shape (height, width, 3), of any sizes. Each is taken once, in a worker thread: a
                sequence that reads files spreads that over the cores too, and holds few images at a time.

        Raises:
            UsageError: an image that isn't uint8 RGB.
        """
        starts = range(0, len(images), self._batch_size)

        def batch(start: int) -> list[tuple[Box, ...]]:
            return self._batch([images[row] for row in range(start, min(start + self._batch_size, len(images)))])

        if self._threads == 1 or len(starts) < 2:
            return [boxes for start in starts for boxes in batch(start)]
        with ThreadPoolExecutor(min(self._threads, len(starts)), "nudenet") as pool:
            return [boxes for found in pool.map(batch, starts) for boxes in found]

    def observe(self, images: Images) -> list[dict[str, Any]]:
        """``{"boxes": [{"name", "score", "box": [x, y, width, height]}, …]}`` of each image; see ``detect``."""
        return [observation(boxes) for boxes in self.detect(images)]

    def _batch(self, images: Sequence[npt.NDArray[np.uint8]]) -> list[tuple[Box, ...]]:
        check_images(images)
        pixels = [self._pixels(image) for image in images]
        # A last, smaller batch is filled up: kernels are chosen by shape, and a cut must not show in the scores.
        pixels += pixels[-1:] * (self._batch_size - len(pixels))
        rows = self._head.candidates(np.concatenate(pixels), ANCHOR_SCORE)
        return [
            self._boxes(row, image.shape[1], image.shape[0])
            for row, image in zip(rows[: len(images)], images, strict=True)
        ]

    def _pixels(self, image: npt.NDArray[np.uint8]) -> Array:
        """What the network reads, (1, 3, side, side)."""
        import cv2

        height, width = image.shape[:2]
        square = max(height, width)
        if height != width:
            image = np.asarray(
                cv2.copyMakeBorder(image, 0, square - height, 0, square - width, cv2.BORDER_CONSTANT), np.uint8
            )
        size, swap = (self._side, self._side), self._channels == "library"
        pixels = cv2.dnn.blobFromImage(np.ascontiguousarray(image), 1 / 255.0, size, (0, 0, 0), swapRB=swap, crop=False)
        return np.asarray(pixels, np.float32)

    def _boxes(self, rows: Array, width: int, height: int) -> tuple[Box, ...]:
        """``rows`` (anchors, 4 + classes) of an image of this size, after suppression."""
        import cv2

        if not len(rows):
            return ()
        kind, score = rows[:, 4:].argmax(1), rows[:, 4:].max(1)
        centre, size = rows[:, :2], rows[:, 2:4]
        # All in float32 and in the package's order of operations: a pixel can hang on the last bit.
        square, side = np.float32(max(width, height)), np.float32(self._side)
        end = np.array([width, height], np.float32)
        corner = np.clip((centre - size / 2) * square / side, 0, end)
        extent = np.minimum(size * square / side, end - corner)
        boxes = np.concatenate([corner, extent], 1).astype(np.float64)
        kept = cv2.dnn.NMSBoxes(boxes.tolist(), score.tolist(), BOX_SCORE, OVERLAP)
        found = []
        for row in np.asarray(kept, np.intp).ravel():
            x, y, box_width, box_height = (int(value) for value in boxes[row])
            found.append(Box(self.labels[kind[row]], float(score[row]), (x, y, box_width, box_height)))
        return tuple(found)


def _weights(model: Path | None) -> Path:
    if model is None:
        package = importlib.util.find_spec("nudenet")
        if package is None or package.origin is None:
            raise MissingExtra("nudenet", "eval")
        model = Path(package.origin).with_name("320n.onnx")
        if not model.is_file():
            raise ModelError(f"{model} is missing: install nudenet again, its wheel holds NudeNet's weights")
    if not model.is_file():
        raise ModelError(
            f"{model} is missing: put NudeNet's weights there (320n.onnx of the nudenet package, or 640m.onnx of its "
            "release v3.4-weights), or leave the model out to take the package's"
        )
    return model


def _version() -> tuple[str, ...]:
    """The package's version; none where a model of its own is used without the package."""
    try:
        return (version("nudenet"),)
    except PackageNotFoundError:
        return ()


def _cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
