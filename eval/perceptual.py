"""How far two images of the same request are apart: LPIPS and PSNR, pair by pair.

LPIPS, Zhang et al., CVPR 2018, arXiv 1801.03924, by its authors' ``lpips`` with an AlexNet trunk and the linear weights
of version 0.1, which the package ships. The trunk's own weights are torchvision's; they are never downloaded.

The RECE paper's artist tables are at 64 × 64. Its code shrinks with OpenCV's bilinear filter, which skips pixels
instead of averaging them; ``size=64`` does the same. ``size=None`` compares the images as they are.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from excise.editfile import fingerprint as weights_fingerprint
from excise.errors import MissingExtra, ModelError, UsageError
from excise.eval.feature_extractor import Fingerprint, Images, check_images, full_batches
from excise.manifest import hash_file

if TYPE_CHECKING:
    import torch

#: torchvision's file; the end of its name is the start of its SHA-256.
TRUNK, _TRUNK_HASH = "alexnet-owt-7be5be79.pth", "7be5be79"

#: AlexNet's last layer has nothing left of a smaller image.
_SMALLEST = 31


class Lpips:
    """LPIPS with AlexNet, version 0.1.

    ``name`` says so only with torchvision's published trunk; with another it has the file's hash in it.

    Args:
        trunk: torchvision's AlexNet, ``alexnet-owt-7be5be79.pth``, or the folder that it is in.
        size: shrink both images to squares of this many pixels (64 in the RECE paper); None compares them as they are.
        batch_size: pairs in each batch; a last, smaller one is filled up.
        device: where the network runs.

    Raises:
        ModelError: the file is missing or isn't AlexNet's weights.
        UsageError: a size that AlexNet can't read.
        MissingExtra: a library isn't installed.
    """

    def __init__(self, trunk: Path, *, size: int | None = 64, batch_size: int = 16, device: str = "cpu") -> None:
        file = trunk / TRUNK if trunk.is_dir() else trunk
        if size is not None and size < _SMALLEST:
            raise UsageError(f"LPIPS needs images of at least {_SMALLEST} × {_SMALLEST}, not {size}")
        if not file.is_file():
            raise ModelError(f"{file} is missing: put torchvision's AlexNet weights, {TRUNK}, there for LPIPS")
        self._size, self._batch_size, self._device = size, batch_size, device
        self._network = _network(file).to(device)
        digest = hash_file(file)
        version = "AlexNet 0.1" if digest.startswith(_TRUNK_HASH) else f"AlexNet 0.1, trunk {file.stem} {digest[:8]}"
        resized = "native" if size is None else f"{size} × {size}"
        self.name = f"LPIPS ({version}, {resized})"
        weights = {key: tensor.cpu().numpy() for key, tensor in self._network.state_dict().items()}
        self.fingerprint = Fingerprint(
            name=self.name,
            weights=weights_fingerprint(weights),
            preprocessing="x / 127.5 − 1" if size is None else f"OpenCV bilinear to {resized}, x / 127.5 − 1",
        )

    def distances(self, first: Images, second: Images) -> npt.NDArray[np.float64]:
        """LPIPS of each pair, with shape (n,).

        Raises:
            UsageError: not as many images in both, an image that isn't uint8 RGB or is too small, or, at native size,
                images that differ in size.
        """
        import torch

        if len(first) != len(second):
            raise UsageError(f"LPIPS needs pairs, not {len(first)} and {len(second)} images")
        values = [np.zeros(0)]
        batches = zip(full_batches(first, self._batch_size), full_batches(second, self._batch_size), strict=True)
        for (ours, counted), (theirs, _) in batches:
            a, b = self._pixels(ours), self._pixels(theirs)
            if a.shape != b.shape:
                raise UsageError(f"LPIPS compares images of one size, not {a.shape[2:]} and {b.shape[2:]}")
            with torch.inference_mode():
                distances = self._network(torch.from_numpy(a).to(self._device), torch.from_numpy(b).to(self._device))
            values.append(distances.double().reshape(-1)[:counted].cpu().numpy())
        return np.concatenate(values)

    def _pixels(self, images: Images) -> npt.NDArray[np.float32]:
        """Float32 in [-1, 1] with shape (n, 3, height, width)."""
        if self._size is not None:
            images = [_shrunk(image, self._size) for image in images]
        if len(shapes := {image.shape for image in images}) > 1:
            raise UsageError(f"LPIPS compares images of one size, not {' and '.join(map(str, sorted(shapes)))}")
        pixels = np.stack(list(images)).transpose(0, 3, 1, 2).astype(np.float32) / np.float32(127.5) - 1
        if min(pixels.shape[2:]) < _SMALLEST:
            raise UsageError(f"LPIPS needs images of at least {_SMALLEST} × {_SMALLEST}, not {pixels.shape[2:]}")
        return np.ascontiguousarray(pixels)


def psnr(first: Images, second: Images) -> npt.NDArray[np.float64]:
    """The peak signal-to-noise ratio of each pair in dB, with shape (n,): 10 log₁₀(255² / mean squared difference).

    Infinite where a pair is equal: a mean over pairs must say how many were.

    Raises:
        UsageError: not as many images in both, a pair that differs in size, or an image that isn't uint8 RGB.
    """
    if len(first) != len(second):
        raise UsageError(f"PSNR needs pairs, not {len(first)} and {len(second)} images")
    errors = np.zeros(len(first))
    for number, (a, b) in enumerate(zip(first, second, strict=True)):
        check_images((a, b))
        if a.shape != b.shape:
            raise UsageError(f"PSNR compares images of one size, not {a.shape} and {b.shape}")
        # Integers: the sum is exact, so it doesn't depend on its order.
        errors[number] = np.square(a.astype(np.int64) - b).sum() / a.size
    with np.errstate(divide="ignore"):
        return 10 * np.log10(255**2 / errors)


def _shrunk(image: npt.NDArray[np.uint8], size: int) -> npt.NDArray[np.uint8]:
    try:
        import cv2
    except ImportError as error:
        raise MissingExtra("opencv-python-headless", "eval") from error
    shrunk: npt.NDArray[np.uint8] = np.asarray(cv2.resize(image, (size, size)), np.uint8)
    return shrunk


def _network(file: Path) -> torch.nn.Module:
    """``lpips``' own network with the trunk's weights from ``file``."""
    try:
        import lpips  # type: ignore[import-untyped]
        import torch
    except ImportError as error:
        raise MissingExtra(error.name or "lpips", "eval") from error
    # lpips builds the trunk with random weights and torchvision's old arguments: neither is the caller's concern.
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "(?s).*weight.*", UserWarning, "torchvision")
        network: torch.nn.Module = lpips.LPIPS(net="alex", version="0.1", pnet_rand=True, verbose=False)
    try:
        stored = torch.load(file, map_location="cpu", weights_only=True)
        # ``net.slice2.3.weight`` is torchvision's ``features.3.weight``.
        names = [name for name in network.state_dict() if name.startswith("net.")]
        trunk = {name: stored["features." + name.split(".", 2)[2]] for name in names}
        # Not strict, since the linear weights stay; the names are the network's own, and shapes are checked.
        network.load_state_dict(trunk, strict=False)
    except Exception as error:
        # torch.load raises whatever the damage leads to: pickle's, zip's and the runtime's errors.
        raise ModelError(f"{file} doesn't hold AlexNet's weights: copy torchvision's {TRUNK} there") from error
    return network.eval().requires_grad_(False)
