"""A classifier of torchvision's with weights from a local file: ResNet-50 for Imagenette by default.

The published evaluations of erased objects ask torchvision's ResNet-50 for an image's ImageNet class (Gandikota et al.,
WACV 2024, arXiv 2308.14761, §5). torchvision has two sets of weights for it with different transforms, IMAGENET1K_V1
(resize to 256) and IMAGENET1K_V2 (to 232), which a state dict doesn't tell apart; the file's SHA-256 does, because
torchvision's file names hold its first digits.
"""

from __future__ import annotations

import pickle
import re
import warnings
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

import numpy as np

from excise.errors import MissingExtra, ModelError, UsageError
from excise.eval.classifier import Classifier, Logits, read_labels
from excise.eval.feature_extractor import Fingerprint, Images, full_batches
from excise.manifest import hash_file

if TYPE_CHECKING:
    import torch
    from torchvision.models import WeightsEnum

_PUBLISHED_HASH = re.compile(r"-([0-9a-f]{8})\.pth$")


def torchvision_classifier(
    weights: Path,
    architecture: str = "resnet50",
    *,
    entry: str | None = None,
    labels: Path | None = None,
    batch_size: int = 16,
    device: str = "cpu",
    top: int = 5,
) -> Classifier:
    """A classifier of torchvision's.

    Args:
        weights: its state dict, ``.pth`` (read without running what a pickle may hold) or ``.safetensors``.
        architecture: the model's name in torchvision.
        entry: the name in torchvision's weights whose transforms and labels are taken, such as ``IMAGENET1K_V2``; None
            finds it by the file's SHA-256, which only a published ``.pth`` has.
        labels: a file with labels in place of the entry's own, for a network that was trained for others.
        batch_size: images in each call of the network.
        device: where it runs.
        top: labels in an observation.

    Raises:
        ModelError: a file that is missing, can't be read, or doesn't fit the architecture.
        UsageError: an unknown architecture or entry, an entry that isn't the file's, or one that has to be named.
        MissingExtra: without torchvision.
    """
    try:
        from torchvision.models import get_model, get_model_weights
    except ImportError as error:
        raise MissingExtra("torchvision", "eval") from error
    import torch
    from PIL import Image

    try:
        entries: Mapping[str, WeightsEnum] = get_model_weights(architecture).__members__
    except ValueError as error:
        raise UsageError(f"torchvision has no model {architecture!r}") from error
    if entry is not None and entry not in entries:
        raise UsageError(f"torchvision has no {architecture} weights {entry!r}: choose one of {', '.join(entries)}")
    if not weights.is_file():
        wanted = [entries[entry]] if entry is not None else list(entries.values())
        files = " or ".join(f"{PurePosixPath(one.url).name} ({one})" for one in wanted)
        raise ModelError(f"{weights} is missing: put torchvision's {files} there; nothing is downloaded")
    sha256 = hash_file(weights)
    chosen = entries[_entry(weights, sha256, entries, entry)]
    names = read_labels(labels) if labels is not None else tuple(chosen.meta["categories"])
    network = get_model(architecture, weights=None, num_classes=len(names))
    _load(network, weights, architecture)
    network.eval().requires_grad_(False).to(device)
    transform = chosen.transforms()

    def logits(images: Images) -> Logits:
        rows = []
        with torch.inference_mode():
            for batch, counted in full_batches(images, batch_size):
                pixels = torch.stack([transform(Image.fromarray(image)) for image in batch])
                rows.append(network(pixels.to(device)).float().cpu().numpy()[:counted])
        return np.concatenate(rows)

    fingerprint = Fingerprint(
        name=f"torchvision {architecture}",
        weights=sha256,
        preprocessing=" ".join(repr(transform).split()),
    )
    return Classifier(architecture, names, fingerprint, logits, top=top)


def _entry(file: Path, sha256: str, entries: Mapping[str, WeightsEnum], given: str | None) -> str:
    """The entry that ``file`` is, or the one given for a file that is none of them."""
    published = {
        name: found[1] for name, one in entries.items() if (found := _PUBLISHED_HASH.search(one.url)) is not None
    }
    same = [name for name, start in published.items() if sha256.startswith(start)]
    if same and given is not None and given not in same:
        raise UsageError(f"{file} holds {same[0]}, not {given}: leave the entry out, or give the other file")
    if given is not None or same:
        return given or same[0]
    raise UsageError(
        f"{file} is none of torchvision's own files: name the entry whose transforms it was trained with, "
        f"one of {', '.join(entries)}"
    )


def _load(network: torch.nn.Module, file: Path, architecture: str) -> None:
    import torch
    from safetensors.torch import load_file

    try:
        if file.suffix == ".safetensors":
            state: Any = load_file(file)
        else:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # of pickles that torch didn't write: they fail below
                state = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged or foreign pickle fails in any way
        reason = (
            "a pickle of more than tensors is never run"
            if isinstance(error, pickle.UnpicklingError)
            else " ".join(str(error).split())[:200] or type(error).__name__
        )
        raise ModelError(f"{file} holds no weights that can be read safely: {reason}") from error
    if not isinstance(state, Mapping) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise ModelError(f"{file} holds no state dict: save the network's state_dict() alone")
    try:
        network.load_state_dict(state)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:200]
        raise ModelError(f"{file} doesn't hold the weights of {architecture} with these labels: {reason}") from error
