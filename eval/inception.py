"""Inception's pool features as clean-fid makes them: the features of *the* FID.

Parmar et al., *On Aliased Resizing and Surprising Subtleties in GAN Evaluation*, CVPR 2022, arXiv 2104.11222. Images
are resized to 299 × 299 by clean-fid's own ``build_resizer("clean")`` (Pillow's bicubic, one channel at a time, in
float32) and read by its own ``InceptionV3W``. The weights, a TorchScript file, are never downloaded.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from cleanfid.inception_torchscript import InceptionV3W
from cleanfid.resize import build_resizer

from excise.errors import ModelError
from excise.eval.feature_extractor import INCEPTION, Fingerprint, Images, full_batches
from excise.manifest import hash_file

#: The published file's name, which clean-fid looks for.
WEIGHTS = "inception-2015-12-05.pt"

_SIZE, _DIMENSION = 299, 2048

#: The published network has 94 convolutions and 1008 logits (Szegedy et al., 2016, as released with TensorFlow).
_CONVOLUTIONS, _LOGITS = 94, (1008, _DIMENSION)


class InceptionExtractor:
    """Features with shape (n, 2048).

    ``name`` is ``Inception`` only where the network in the file has the published one's convolutions and logits;
    otherwise it has the file's hash in it, and so has the name of every distance between its features.

    Args:
        path: ``inception-2015-12-05.pt``, or the folder that it is in.
        batch_size: images in each batch; a last, smaller one is filled up.
        device: where the network runs.
        threads: threads that resize; None takes as many as PyTorch computes with.

    Raises:
        ModelError: the file is missing or no such network.
    """

    dimension = _DIMENSION

    def __init__(self, path: Path, *, batch_size: int = 16, device: str = "cpu", threads: int | None = None) -> None:
        file = path / WEIGHTS if path.is_dir() else path
        if not file.is_file() or file.name != WEIGHTS:
            raise ModelError(
                f"{file} is not Inception's weights: put {WEIGHTS}, the TorchScript file that clean-fid uses, there, "
                "or choose another feature extractor"
            )
        self._batch_size, self._device = batch_size, torch.device(device)
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", r".*torch\.jit\.load", FutureWarning)
                network = InceptionV3W(str(file.parent), download=False, resize_inside=False)
        except (RuntimeError, AttributeError, ValueError, OSError) as error:
            raise ModelError(f"{file} is not a TorchScript network with layers: copy {WEIGHTS} there again") from error
        self._network = network.eval().requires_grad_(False).to(self._device)
        digest = hash_file(file)
        shapes = [tuple(tensor.shape) for tensor in network.base.state_dict().values()]
        published = sum(len(shape) == 4 for shape in shapes) == _CONVOLUTIONS and _LOGITS in shapes
        self.name = INCEPTION if published else f"{file.stem} {digest[:8]}"
        self.fingerprint = Fingerprint(
            name=self.name, weights=digest, preprocessing=f"clean-fid's clean resizing to {_SIZE}, (x − 128) / 128"
        )
        self._resize = build_resizer("clean")
        self._threads = ThreadPoolExecutor(threads or torch.get_num_threads(), "resize")

    def image_features(self, images: Images) -> npt.NDArray[np.float32]:
        """Pool features with shape (n, 2048). The next batch is resized while the network reads one.

        Raises:
            UsageError: an image isn't uint8 RGB.
            ModelError: the network doesn't give 2048 features.
        """
        rows = [np.zeros((0, _DIMENSION), np.float32)]
        waiting: tuple[list[Future[npt.NDArray[np.float32]]], int] | None = None
        for batch, counted in full_batches(images, self._batch_size):
            # Only the images that count are resized; the rest of the batch is the last of them again.
            started = self._start(batch[:counted])
            if waiting is not None:
                rows.append(self._run(*waiting))
            waiting = started, counted
        if waiting is not None:
            rows.append(self._run(*waiting))
        return np.concatenate(rows)

    def _start(self, batch: Sequence[npt.NDArray[np.uint8]]) -> list[Future[npt.NDArray[np.float32]]]:
        return [self._threads.submit(self._resize, image) for image in batch]

    def _run(self, resized: list[Future[npt.NDArray[np.float32]]], counted: int) -> npt.NDArray[np.float32]:
        pixels = np.empty((self._batch_size, 3, _SIZE, _SIZE), np.float32)
        for number, future in enumerate(resized):
            pixels[number] = future.result().transpose(2, 0, 1)
        pixels[counted:] = pixels[counted - 1]
        try:
            with torch.inference_mode():
                features = self._network(torch.from_numpy(pixels).to(self._device))
        except RuntimeError as error:
            raise ModelError(
                f"{self.name} doesn't turn images of {_SIZE} × {_SIZE} into {_DIMENSION} features: copy {WEIGHTS} again"
            ) from error
        counts: npt.NDArray[np.float32] = features[:counted].float().cpu().numpy()
        return counts
