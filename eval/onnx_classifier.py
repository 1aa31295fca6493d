"""Any image classifier in an ONNX file, with its labels in a text file."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt

from excise.errors import MissingExtra, ModelError, UsageError
from excise.eval.classifier import Classifier, Logits, read_labels
from excise.eval.feature_extractor import Fingerprint, Images, full_batches
from excise.eval.onnx_session import open_session
from excise.manifest import hash_file
from excise.serve.onnx_component import Provider, one_line


@dataclass(frozen=True)
class Preprocessing:
    """From an image to what the network reads: resized, cropped in the middle, x / 255, normalised by channel.

    The defaults are torchvision's of 2016 (IMAGENET1K_V1), which most classifiers of ImageNet were trained with.

    Raises:
        UsageError: a size below 1, a crop that is larger than the resized image, or a standard deviation of 0.
    """

    resize: int = 256  #: pixels of the shorter side
    crop: int = 224  #: pixels a side
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"

    def __post_init__(self) -> None:
        if not 1 <= self.crop <= self.resize:
            raise UsageError(f"a crop of {self.crop} pixels can't come from an image resized to {self.resize}")
        if min(self.std) <= 0:
            raise UsageError(f"a standard deviation is above 0, not {min(self.std)}")

    def transform(self) -> Callable[[npt.NDArray[np.uint8]], npt.NDArray[np.float32]]:
        """From uint8 (height, width, 3) to float32 (3, crop, crop).

        Raises:
            MissingExtra: without torchvision.
        """
        try:
            from torchvision import transforms
        except ImportError as error:
            raise MissingExtra("torchvision", "eval") from error
        from PIL import Image

        steps = transforms.Compose(
            [
                transforms.Resize(self.resize, transforms.InterpolationMode(self.interpolation)),
                transforms.CenterCrop(self.crop),
                transforms.ToTensor(),
                transforms.Normalize(self.mean, self.std),
            ]
        )

        def apply(image: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
            pixels: npt.NDArray[np.float32] = steps(Image.fromarray(image)).numpy()
            return pixels

        return apply


def onnx_classifier(
    model: Path,
    labels: Path,
    preprocessing: Preprocessing | None = None,
    *,
    name: str | None = None,
    batch_size: int = 16,
    threads: int | None = None,
    provider: Provider = "cpu",
    top: int = 5,
) -> Classifier:
    """A classifier in ONNX: one input (n, 3, height, width), whose first output is logits (n, labels).

    Args:
        model: the file.
        labels: one a line, in the order of the outputs.
        preprocessing: None takes ``Preprocessing``'s defaults.
        name: as in reports; None takes the file's.
        batch_size: images in each call; a model of a fixed batch has its own.
        threads: cores for each call; None leaves it to ONNX Runtime.
        provider: ``cpu``, ``cuda`` or ``tensorrt``.
        top: labels in an observation.

    Raises:
        ModelError: a file that is missing or can't be loaded, or a model that doesn't take images.
        UsageError: a provider that can't be used.
        MissingExtra: without torchvision.
    """
    if not model.is_file():
        raise ModelError(f"{model} is missing: put the ONNX file of the classifier there; nothing is downloaded")
    names = read_labels(labels)
    preprocessing = preprocessing or Preprocessing()
    session = open_session(model, provider, threads=threads)
    shapes = [tuple(node.shape) for node in session.get_inputs()]
    if len(shapes) != 1 or len(shapes[0]) != 4 or shapes[0][1] != 3 or session.get_inputs()[0].type != "tensor(float)":
        raise ModelError(
            f"{model} is no classifier of images: its inputs are {shapes}, not one of float32 (n, 3, h, w)"
        )
    fixed = [size for size in shapes[0][2:] if isinstance(size, int) and size != preprocessing.crop]
    if fixed:
        raise ModelError(
            f"{model} reads images of {shapes[0][2]} × {shapes[0][3]}, not of {preprocessing.crop}: set the crop"
        )
    batch = shapes[0][0] if isinstance(shapes[0][0], int) else batch_size
    input_name = session.get_inputs()[0].name
    transform = preprocessing.transform()

    def logits(images: Images) -> Logits:
        rows = []
        for part, counted in full_batches(images, batch):
            pixels = np.stack([transform(image) for image in part])
            try:
                output = session.run(None, {input_name: pixels})[0]
            except Exception as error:  # ONNX Runtime's errors share no base class
                raise ModelError(f"{model} failed on images: {one_line(error)}") from error
            rows.append(output[:counted])
        return np.concatenate(rows).astype(np.float32, copy=False)

    fingerprint = Fingerprint(name=f"ONNX {model.name}", weights=hash_file(model), preprocessing=repr(preprocessing))
    return Classifier(name or model.stem, names, fingerprint, logits, top=top)
