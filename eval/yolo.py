"""A YOLOv8 detector in ONNX, whose boxes are computed only where a class is seen.

YOLOv8 has a decoupled head (Jocher et al., Ultralytics YOLOv8, 2023): at each of three scales one branch of
convolutions gives every anchor its class logits, another the four distances to its box's sides. A distance is the mean
of a distribution over 16 bins (Li et al., *Generalized Focal Loss*, NeurIPS 2020, arXiv 2006.04388, §3.2); the anchor
at (a_x, a_y) of the scale with stride s has the box

    d = Σ_k k softmax(z)_k,   s · (a_x − d_l, a_y − d_t, a_x + d_r, a_y + d_b)

In most images nearly all anchors see nothing, yet the exported graph computes all their boxes. Here the graph is cut
into a trunk that ends at the class logits, the three box branches, and the two functions σ(z) and d(z). A box branch
runs only at a scale where a class is seen, d(z) only for those anchors. The kernels are ONNX Runtime's own, on the same
numbers: the answer is the whole graph's.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from excise.errors import MissingExtra, ModelError, UsageError
from excise.eval.onnx_session import open_session
from excise.serve.onnx_component import Provider, one_line

if TYPE_CHECKING:
    from onnx import ModelProto, ValueInfoProto
    from onnxruntime import InferenceSession

Array = npt.NDArray[np.float32]

_BOX_LOGITS = re.compile(r"(/model\.\d+)/cv2\.0/cv2\.0\.2/Conv_output_0")
_SCALES = range(3)
#: Logits this much below the threshold's are followed too: σ of ONNX Runtime, in float32, has the last word.
_SLACK = np.float32(1e-2)


class Head(Protocol):
    """From pixels to the anchors that see something."""

    def candidates(self, pixels: Array, threshold: float) -> list[Array]:
        """Rows (x, y, width, height, score of each class) of each image's anchors with a score ≥ ``threshold``.

        Args:
            pixels: with shape (n, 3, side, side).
            threshold: a score between 0 and 1.

        Returns:
            n arrays with shape (anchors found, 4 + classes); centre and size in pixels of the input.
        """
        ...


class Yolo(NamedTuple):
    """A detector, opened."""

    head: Head
    labels: tuple[str, ...]
    side: int  #: pixels that it reads, a multiple of its largest stride, 32


def open_yolo(source: Path, *, side: int | None = None, batch_size: int = 1, provider: Provider = "cpu") -> Yolo:
    """A YOLOv8 file, its graph cut if it can be.

    Args:
        side: pixels to read; None takes what the file was exported for, as its metadata says, or else 320.
        batch_size: images to read together.

    Raises:
        ModelError: the file can't be read, or it isn't a detector of this kind.
        UsageError: the provider, the side or the batch can't be used.
        MissingExtra: without the onnx package.
    """
    try:
        import onnx
    except ImportError as error:
        raise MissingExtra("onnx", "eval") from error
    try:
        model = onnx.load(source)
    except Exception as error:  # protobuf's errors share no class with others
        raise ModelError(f"{source} is no ONNX model: {one_line(error)}") from error
    metadata = {entry.key: entry.value for entry in model.metadata_props}
    labels = _labels(source, metadata)
    shapes = [_shape(value) for value in (*model.graph.input, *model.graph.output)]
    if [len(shape) for shape in shapes] != [4, 3] or shapes[1][1] not in (0, 4 + len(labels)):
        raise ModelError(f"{source} is no YOLOv8 detector of {len(labels)} classes: its input and output are {shapes}")
    batch, _, height, width = shapes[0]
    side = side or height or _exported_side(metadata.get("imgsz", ""))
    if side % 32:
        raise UsageError(f"{source} reads images of a multiple of 32 pixels a side, not of {side}")
    for name, fixed, given in (("batch", batch, batch_size), ("height", height, side), ("width", width, side)):
        if fixed not in (0, given):
            raise UsageError(f"{source} was exported for a {name} of {fixed} alone, not of {given}")
    # Images are spread over threads: an image a core is faster than a core a slice of each layer.
    open_part = partial(open_session, source, provider, threads=1)
    prefix = None if batch or height or width else _head_prefix(model)  # else shapes are baked into the graph
    return Yolo(WholeHead(open_part) if prefix is None else CutHead(open_part, model, prefix), labels, side)


def _shape(value: ValueInfoProto) -> tuple[int, ...]:
    """Its dimensions, 0 where any size is taken."""
    return tuple(dimension.dim_value for dimension in value.type.tensor_type.shape.dim)


def _labels(source: Path, metadata: Mapping[str, str]) -> tuple[str, ...]:
    """The classes by their number, from what Ultralytics' export notes as ``names``."""
    try:
        names = ast.literal_eval(metadata["names"])
        return tuple(str(names[number]) for number in range(len(names)))
    except (KeyError, ValueError, SyntaxError, TypeError) as error:
        raise ModelError(f"{source} doesn't say what its classes are: its metadata has no usable 'names'") from error


def _exported_side(image_size: str) -> int:
    """From the metadata's ``[320, 320]``; 320 where it says nothing."""
    sides = {int(number) for number in image_size.strip("[] ").split(",") if number.strip().isdigit()}
    return sides.pop() if len(sides) == 1 else 320


def _head_prefix(model: ModelProto) -> str | None:
    """Where the head's nodes are, by the names that Ultralytics' export gives them; None where they are called else."""
    outputs = {name for node in model.graph.node for name in node.output}
    for name in outputs:
        if found := _BOX_LOGITS.fullmatch(name):
            head = found[1]
            wanted = {
                f"{head}/cv{kind}.{scale}/cv{kind}.{scale}.2/Conv_output_0" for kind in (2, 3) for scale in _SCALES
            }
            wanted |= {f"{head}/Split_1_output_0", f"{head}/Split_1_output_1"}
            wanted |= {f"{head}/dfl/Reshape_1_output_0", f"{head}/Sigmoid_output_0"}
            return head if wanted <= outputs else None
    return None


class WholeHead:
    """The exported graph as it is: every anchor's box."""

    def __init__(self, open_part: Callable[[], InferenceSession]) -> None:
        self._session = open_part()
        self._input = self._session.get_inputs()[0].name

    def candidates(self, pixels: Array, threshold: float) -> list[Array]:
        """As ``Head`` says."""
        rows = self._session.run(None, {self._input: pixels})[0].transpose(0, 2, 1)
        return [one[one[:, 4:].max(1) >= np.float32(threshold)] for one in rows]


class CutHead:
    """The graph cut below its class logits."""

    def __init__(self, open_part: Callable[[bytes], InferenceSession], model: ModelProto, head: str) -> None:
        parts = {name: open_part(part) for name, part in _cut(model, head).items()}
        self._trunk, self._functions = parts["trunk"], parts["functions"]
        self._branches = [parts[f"boxes {scale}"] for scale in _SCALES]
        self._input = model.graph.input[0].name

    def candidates(self, pixels: Array, threshold: float) -> list[Array]:
        """As ``Head`` says."""
        outputs = self._trunk.run(None, {self._input: pixels})
        logits, features = outputs[: len(_SCALES)], outputs[len(_SCALES) :]
        return [
            self._image([one[row] for one in logits], [one[row] for one in features], pixels.shape[-1], threshold)
            for row in range(len(pixels))
        ]

    def _image(self, logits: list[Array], features: list[Array], side: int, threshold: float) -> Array:
        """``logits`` (classes, h, w) and ``features`` (channels, h, w) of one image, by scale."""
        least = np.log(np.float32(threshold) / np.float32(1 - threshold)) - _SLACK
        classes, bins, anchors, strides = [], [], [], []
        for branch, one, feature in zip(self._branches, logits, features, strict=True):
            seen = np.flatnonzero(one.max(0) >= least)
            if not len(seen):
                continue
            # A batch of one, always: kernels are chosen by shape, and an image's answer must not depend on others.
            (boxes,) = branch.run(None, {branch.get_inputs()[0].name: feature[None]})
            width = one.shape[2]
            classes.append(one.reshape(len(one), -1)[:, seen])
            bins.append(boxes[0].reshape(boxes.shape[1], -1)[:, seen])
            anchors.append(np.stack([seen % width, seen // width]).astype(np.float32) + np.float32(0.5))
            strides.append(np.full(len(seen), side / width, np.float32))
        if not classes:
            return np.zeros((0, 4 + len(logits[0])), np.float32)
        bin_input, class_input = (one.name for one in self._functions.get_inputs())
        distances, scores = self._functions.run(
            None, {bin_input: np.concatenate(bins, 1)[None], class_input: np.concatenate(classes, 1)[None]}
        )
        centre = np.concatenate(anchors, 1)
        # In the graph's own order of operations: float32 sums round differently in another.
        low, high = centre - distances[0, :2], centre + distances[0, 2:]
        boxes = np.concatenate([(low + high) / 2, high - low]) * np.concatenate(strides)
        kept = scores[0].max(0) >= np.float32(threshold)
        rows: Array = np.concatenate([boxes, scores[0]])[:, kept].T
        return rows


def _cut(model: ModelProto, head: str) -> dict[str, bytes]:
    """The parts, by name. ``trunk`` gives class logits scale by scale, then the features that boxes come from."""
    from onnx.shape_inference import infer_shapes
    from onnx.utils import Extractor

    producer = {name: node for node in model.graph.node for name in node.output}
    features = [producer[f"{head}/cv2.{scale}/cv2.{scale}.0/conv/Conv_output_0"].input[0] for scale in _SCALES]
    logits = [f"{head}/cv3.{scale}/cv3.{scale}.2/Conv_output_0" for scale in _SCALES]
    boxes = [f"{head}/cv2.{scale}/cv2.{scale}.2/Conv_output_0" for scale in _SCALES]
    extractor = Extractor(infer_shapes(model))

    def part(inputs: list[str], outputs: list[str]) -> Any:
        return extractor.extract_model(inputs, outputs)

    parts = {"trunk": part([model.graph.input[0].name], logits + features)}
    for scale in _SCALES:
        parts[f"boxes {scale}"] = part([features[scale]], [boxes[scale]])
    functions = part(
        [f"{head}/Split_1_output_0", f"{head}/Split_1_output_1"],
        [f"{head}/dfl/Reshape_1_output_0", f"{head}/Sigmoid_output_0"],
    )
    # They get as many anchors as saw something, not the number that was inferred for the whole image.
    for value in (*functions.graph.input, *functions.graph.output):
        value.type.tensor_type.ClearField("shape")
    del functions.graph.value_info[:]
    parts["functions"] = functions
    return {name: one.SerializeToString() for name, one in parts.items()}
