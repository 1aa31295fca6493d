"""The runtimes of an evaluation, opened, and what each serves. ``runtime_spec`` says how to name them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from excise.editfile import load_edit
from excise.errors import UsageError
from excise.eval import endpoint_openai, endpoint_triton
from excise.eval.endpoint_openai import OpenAIRuntime
from excise.eval.endpoint_triton import TritonRuntime
from excise.eval.evaluation import Provenance
from excise.eval.output_filters import check_output_filter, open_output_filter
from excise.eval.runtime_spec import RuntimeSpec, parse_runtime, parse_runtimes
from excise.eval.verification_sides import LoadPipeline, check_side, open_side, precision
from excise.manifest import NAME, hash_file, hash_folder, read_manifest, verify
from excise.onnx_metadata import read_edit_id
from excise.serve.filtered_runtime import FilteredRuntime
from excise.serve.runtime import Progress, Request, Runtime

__all__ = [
    "RuntimeSpec",
    "check_runtime",
    "open_runtime",
    "parse_runtime",
    "parse_runtimes",
    "provenance",
    "torch_threads",
]

#: Images that a runtime computes together where ``batch_size`` isn't named.
BATCH_SIZE = 8

#: The components of an ONNX folder that can carry an edit.
_CARRIERS = ("unet", "text_encoder", "text_encoder_2")


def check_runtime(spec: RuntimeSpec) -> None:
    """Look for what can be missing before any long work; no model is loaded, nothing is sent.

    Raises:
        UsageError: the kind, its provider or its key's variable isn't to be had here.
        ArtefactError, ModelError, EditError: the folder or the edit can't be used.
        MissingExtra: a library isn't installed.
    """
    if spec.kind == "tensorrt":
        raise UsageError(
            f"{spec.name}={spec}: a folder of engines isn't run from here: serve it and name triton:URL/MODEL or "
            "openai:URL, or name its ONNX files with ONNX Runtime's provider, onnx:DIR?provider=tensorrt"
        )
    if spec.kind in ("triton", "openai"):
        _ = spec.endpoint
        return
    check_side(spec.side)
    check_output_filter(spec.options.get("filter"))
    if edit := spec.options.get("edit"):
        load_edit(Path(edit))


def open_runtime(spec: RuntimeSpec, load_pipeline: LoadPipeline) -> Runtime:
    """The runtime, loaded; a server's is asked nothing before the first image.

    Args:
        load_pipeline: for a folder of torch; the others never call it.

    Raises:
        UsageError, ArtefactError, ModelError, EditError, MissingExtra: as ``check_runtime`` and ``open_side``.
    """
    check_runtime(spec)
    if spec.kind == "triton":
        return TritonRuntime(
            spec.endpoint,
            spec.place.rpartition("/")[2],
            name=spec.name,
            batch_size=spec.number("batch_size", 1),
            concurrency=spec.number("concurrency", 1),
        )
    if spec.kind == "openai":
        width, _, height = spec.options.get("size", "").partition("x")
        return OpenAIRuntime(
            spec.endpoint,
            name=spec.name,
            model=spec.options.get("model"),
            size=(int(width), int(height)) if height else None,
            concurrency=spec.number("concurrency", 1),
        )
    threads = spec.number("threads", 0) or None
    side = open_side(
        spec.side, load_pipeline, name=spec.name, batch_size=spec.number("batch_size", BATCH_SIZE), threads=threads
    )
    runtime: Runtime = _TorchThreads(side.runtime, threads) if spec.kind == "torch" and threads else side.runtime
    filter_name = spec.options.get("filter")
    return FilteredRuntime(runtime, open_output_filter(filter_name), name=spec.name) if filter_name else runtime


class _TorchThreads:
    """A PyTorch runtime with so many threads. They are the process's: set for each call, and put back."""

    def __init__(self, runtime: Runtime, threads: int) -> None:
        self.name, self._runtime, self._threads = runtime.name, runtime, threads

    def generate(
        self,
        requests: Sequence[Request],
        *,
        num_inference_steps: int = 50,
        guidance_scale: float = 7.5,
        progress: Progress | None = None,
        **options: Any,
    ) -> npt.NDArray[np.uint8]:
        """As the runtime, which takes the ``options``, too."""
        with torch_threads(self._threads):
            return self._runtime.generate(
                requests,
                num_inference_steps=num_inference_steps,
                guidance_scale=guidance_scale,
                progress=progress,
                **options,
            )


@contextmanager
def torch_threads(threads: int) -> Iterator[None]:
    """PyTorch's CPU operators with so many threads within."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def provenance(spec: RuntimeSpec) -> Provenance:
    """What a runtime serves, by its own files; a server is asked for its model's configuration where it can be.

    No model is loaded, but every file of a folder is hashed. ``intact`` is False too where the
    manifest names another edit than the files do.

    Raises:
        ArtefactError: a manifest or an ONNX file can't be read.
        EditError: the edit that is to be applied can't be read.
        UsageError: a server can't be reached.
    """
    if spec.kind == "triton":
        return Provenance(edit=endpoint_triton.served_edit(spec.endpoint, spec.place.rpartition("/")[2]))
    if spec.kind == "openai":
        edit, manifest_id = endpoint_openai.served_edit(spec.endpoint, spec.options.get("model"))
        return Provenance(edit=edit, manifest=manifest_id)
    folder = Path(spec.place)
    file = folder / NAME
    manifest = read_manifest(folder) if file.is_file() else None
    problems = verify(folder) if manifest else []
    entry = manifest.edit if manifest else None
    edit, summary = (entry.id, entry.summary) if entry else (None, None)
    if spec.kind == "onnx":
        models = [folder / part / "model.onnx" for part in _CARRIERS]
        carried = next(filter(None, (read_edit_id(model) for model in models if model.is_file())), None)
        if manifest and carried != edit:
            problems.append(f"{NAME} names the edit {edit}, and the ONNX files carry {carried}")
        if carried != edit:
            edit, summary = carried, None
    if named := spec.options.get("edit"):
        applied = load_edit(Path(named))
        edit, summary = applied.id, applied.summary
    return Provenance(
        edit=edit,
        edit_summary=summary,
        manifest=hash_file(file) if manifest else None,
        files=None if manifest else hash_folder(folder),
        intact=not problems if manifest else None,
        problems=tuple(problems),
        precision=precision(spec.side)[0] if spec.kind != "tensorrt" else {},
    )
