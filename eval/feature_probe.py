"""A probe on a frozen network's features, such as Q16: whether an image is inappropriate.

Q16 (Schramowski, Tauchmann & Kersting, FAccT 2022, arXiv 2202.06675) tunes one embedding a class in CLIP's space and
takes the class whose embedding is nearest to the image: softmax over 100 · cos(f, p_k), inappropriate from 0.5 on. A
linear probe has logits W f + b. Both are a small file of tensors beside a CLIP, read as numbers, never as a pickle.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Final

import numpy as np

from excise.errors import ModelError
from excise.eval.classifier import Classifier, Logits
from excise.eval.feature_extractor import FeatureExtractor, Fingerprint, Images
from excise.manifest import hash_file

#: Q16's classes, in the order of its published embeddings.
Q16_LABELS: Final = ("appropriate", "inappropriate")
#: What Q16 multiplies cosines by: CLIP's own scale at the end of its training.
SCALE: Final = 100.0


def feature_probe(
    probe: Path, extractor: FeatureExtractor, *, name: str = "Q16", labels: Sequence[str] = Q16_LABELS
) -> Classifier:
    """A classifier from an extractor's features.

    Args:
        probe: a safetensors file with ``embeddings`` (labels, d), compared by cosine; or with ``weight`` (labels, d)
            and ``bias`` (labels,), a linear probe of the features as they come.
        extractor: the network, d wide. Q16's published embeddings are of OpenAI's CLIP ViT-L/14.
        name: as in reports.
        labels: of the rows.

    Raises:
        ModelError: a file that is missing, holds other tensors, or doesn't fit the extractor or the labels.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    rows = (len(labels), extractor.dimension)
    if not probe.is_file():
        raise ModelError(
            f"{probe} is missing: put a safetensors file there with 'embeddings' {rows}, such as Q16's two prompt "
            "embeddings, or with a linear probe's 'weight' and 'bias'"
        )
    try:
        tensors = {key: value.astype(np.float64) for key, value in load_file(probe).items()}
    except (OSError, SafetensorError, TypeError, KeyError) as error:
        raise ModelError(f"{probe} is no safetensors file that NumPy can read: {error}") from error
    shapes = {key: value.shape for key, value in tensors.items()}
    if shapes == {"embeddings": rows}:
        norms = np.linalg.norm(tensors["embeddings"], axis=1, keepdims=True)
        if not norms.all():
            raise ModelError(f"{probe} has an embedding of length 0")
        weight, bias, cosine = SCALE * tensors["embeddings"] / norms, np.zeros(len(labels)), True
    elif shapes == {"weight": rows, "bias": rows[:1]}:
        weight, bias, cosine = tensors["weight"], tensors["bias"], False
    else:
        raise ModelError(
            f"{probe} holds {shapes or 'nothing'}: a probe of {extractor.name} with these labels is 'embeddings' "
            f"{rows}, or 'weight' {rows} and 'bias' {rows[:1]}"
        )

    def logits(images: Images) -> Logits:
        features = extractor.image_features(images).astype(np.float64)
        if cosine:
            features = features / np.linalg.norm(features, axis=1, keepdims=True)
        result: Logits = (features @ weight.T + bias).astype(np.float32)
        return result

    fingerprint = Fingerprint(
        name=f"probe on {extractor.fingerprint.name}",
        weights=hash_file(probe),
        preprocessing=f"features of {extractor.fingerprint.weights}: {extractor.fingerprint.preprocessing}",
    )
    return Classifier(name, labels, fingerprint, logits, top=len(labels))
