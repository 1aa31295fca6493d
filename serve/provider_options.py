"""Options of ONNX Runtime's CUDA and TensorRT providers, with an engine cache that no edit shares with another.

The TensorRT provider names a cached engine after the graph, not after the weights: with one cache folder, the engine
of an earlier edit would be loaded in place of the one that the folder carries, without a word. The folder is therefore
named after the manifest, which holds every file's hash, and after an edit that is put in at load.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from excise.enginefile import Range
from excise.errors import UsageError
from excise.serve.onnx_component import PROVIDERS

_SHA256 = re.compile("[0-9a-f]{64}")


def provider_options(
    provider: str,
    manifest_sha256: str | None,
    cache_dir: Path | None,
    profiles: Sequence[Mapping[str, Range]] = (),
    *,
    component: str = "",
    edit_id: str | None = None,
    device: int = 0,
    tf32: bool = False,
) -> list[tuple[str, dict[str, str]]]:
    """What ``InferenceSession`` takes as ``providers``, the wanted one first and those that take its leftovers behind.

    Args:
        provider: ``cpu``, ``cuda`` or ``tensorrt``.
        manifest_sha256: SHA-256 of the folder's ``excise.json``; None for a folder without one, whose engines can't be
            told apart and are not kept.
        cache_dir: Where engines and times of kernels are kept, None for nowhere; nothing is written here.
        profiles: Ranges of every input with a free shape, for TensorRT; none leaves the shapes to the first calls.
        component: The model's name in its folder, such as ``unet``, for a cache of its own: the pipeline's graphs have
            one name.
        edit_id: Id of an edit that takes the place of the folder's own in memory, of which the manifest says nothing.
        device: The GPU's number.
        tf32: Let CUDA round the factors of float32 products to 11 significant bits, as ONNX Runtime does by itself.

    Raises:
        UsageError: An unknown provider, a hash that isn't one, a negative device, or profiles of different inputs.
    """
    if provider not in PROVIDERS:
        raise UsageError(f"unknown provider {provider!r}: choose one of {', '.join(PROVIDERS)}")
    if device < 0:
        raise UsageError(f"device={device}: give the number of a GPU, from 0")
    options = {
        "TensorrtExecutionProvider": {
            "device_id": str(device),
            **_caches(manifest_sha256, edit_id, cache_dir, component),
            **_shapes(profiles),
        },
        "CUDAExecutionProvider": {"device_id": str(device), "use_tf32": str(int(tf32))},
        "CPUExecutionProvider": {},
    }
    return [(name, options[name]) for name in PROVIDERS[provider]]


def _caches(manifest_sha256: str | None, edit_id: str | None, cache_dir: Path | None, component: str) -> dict[str, str]:
    """An engine cache of this manifest and edit alone; times of kernels depend on no weight and are shared."""
    for name, value in (("manifest_sha256", manifest_sha256), ("edit_id", edit_id)):
        if value is not None and not _SHA256.fullmatch(value):
            raise UsageError(f"{name}={value!r} isn't a SHA-256 in lower-case hexadecimal digits")
    if cache_dir is None or manifest_sha256 is None:
        return {}
    return {
        "trt_engine_cache_enable": "True",
        "trt_engine_cache_path": str(cache_dir / manifest_sha256 / (edit_id or "as-exported") / component),
        "trt_timing_cache_enable": "True",
        "trt_timing_cache_path": str(cache_dir / "timing"),
    }


def _shapes(profiles: Sequence[Mapping[str, Range]]) -> dict[str, str]:
    """``trt_profile_*_shapes``: ``name:1x4x8x8`` for each input of each profile, separated by commas."""
    if len({tuple(sorted(profile)) for profile in profiles}) > 1:
        raise UsageError("the profiles have different inputs: give each of them every input with a free shape")
    shapes = {}
    for bound in ("min", "opt", "max") if profiles else ():
        entries = [
            f"{name}:{'x'.join(str(size) for size in getattr(ranges, bound))}"
            for profile in profiles
            for name, ranges in profile.items()
        ]
        shapes[f"trt_profile_{bound}_shapes"] = ",".join(entries)
    return shapes
