"""A new edit in a built engine: the ONNX folder is patched, and its denoiser's engine refitted in place of a new build.

What is checked is what will be served: the refitted engine is serialised, opened again, and its output compared with
the patched ONNX model's. Nothing is written before that.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from excise import __version__
from excise.edited_initializers import edited_initializers
from excise.editfile import Edit
from excise.enginefile import ENGINE, EngineEntry, check_engine, entry_of, entry_path, read_engine
from excise.errors import ArtefactError, UsageError
from excise.export.engine_execution import EngineExecution, check_execution, open_engine, serialized
from excise.export.engine_library import EngineLibrary, gpu_capability, load_library
from excise.export.engine_pipeline import MODEL, record_engines
from excise.export.parity import DenoiserInputs, onnx_outputs
from excise.export.patch import data_file, patch
from excise.export.refit_check import check_inputs, compare, engine_outputs
from excise.export.refit_plan import RefitPlan, execute, refit_plan
from excise.manifest import NAME, Manifest, WeightEntry, read_manifest
from excise.output import check_free, new_folder, replaced_folder
from excise.parity import Parity


@dataclass(frozen=True)
class Refitted:
    """A folder with a refitted engine.

    Attributes:
        entry: The engine's, as written.
        manifest: The folder's, as written.
        parity: The engine against the patched ONNX model, relative to the engine before the refit.
    """

    entry: EngineEntry
    manifest: Manifest
    parity: Parity


@dataclass(frozen=True)
class _Job:
    """All of a refit that is known before the GPU has to do anything."""

    engine: Path
    entry: EngineEntry
    plan: RefitPlan
    inputs: DenoiserInputs
    library: EngineLibrary


def refit(
    folder: Path,
    edit: Edit,
    library: str | EngineLibrary | None = None,
    *,
    out: Path | None = None,
    force: bool = False,
    progress: Callable[[str], None] | None = None,
) -> Refitted:
    """Write ``folder`` with ``edit`` in place of the edit that its ONNX files and its denoiser's engine carry, if any.

    Everything that can be refused is, before the engine is opened. The folder appears or changes in one step, when
    the refitted engine has computed what the patched ONNX model does.

    Args:
        folder: What ``excise engines`` wrote, with refit: true, or a refit.
        edit: Made for the unedited model.
        library: ``tensorrt`` or ``tensorrt-rtx``, or one that is loaded; by default the one that built the engine.
        out: A new folder, which shares unchanged files by hard links; by default ``folder`` itself is replaced.
        force: Apply the edit although it was made for other weights.
        progress: Told each step, one line at a time.

    Raises:
        ArtefactError: ``folder`` is incomplete, its engine was altered or is stale, the library fails, or the refitted
            engine doesn't compute what the patched ONNX model does.
        UsageError: The engine can't be refitted, or not by this library or on this machine, or has these weights.
        EditError: The edit moves other weights than a refit can (FingerprintMismatch: it was made for another model).
        NumericsError: An edited weight isn't finite in the model's dtype.
        OutputError: ``out`` holds something, or ``folder`` can't be replaced in one step here.
        MissingExtra: The library, onnxruntime or PyTorch isn't installed.
    """
    say = progress or (lambda message: None)
    if out is not None:
        check_free(out)
    engine = folder / edit.metadata.component / ENGINE
    say(f"checking {engine}")
    entry, loaded = _check(engine, library)
    job = _planned(folder, engine, entry, edit, loaded, force)
    place: AbstractContextManager[Path] = replaced_folder(folder) if out is None else new_folder(out)
    with place as partial:
        mode = partial.stat().st_mode & 0o777
        manifest = patch(folder, edit, out=partial, force=force, progress=progress)
        partial.chmod(mode)  # the patch put a folder of its own in this one's place
        onnx = partial / edit.metadata.component / MODEL
        data, figures = _checked_engine(job, onnx, say)
        say("writing the engine")
        new = _entry(job.entry, edit, manifest, data)
        return _write(partial, edit, loaded, manifest, new, data, figures)


def _check(engine: Path, asked: str | EngineLibrary | None) -> tuple[EngineEntry, EngineLibrary]:
    """The engine's entry and the library that built it, if that engine can be refitted on this machine."""
    if problems := check_engine(engine):
        raise ArtefactError(problems[0])
    entry = read_engine(engine)
    if not entry.refittable:
        raise UsageError(
            f"{engine} can't be refitted: build it again with refit: true, on a machine with a GPU, by "
            "excise engines --options FILE --rebuild; or use excise patch --out and excise engines"
        )
    name = asked.name if isinstance(asked, EngineLibrary) else (asked or entry.library).replace("-", "_")
    if name != entry.library:
        raise UsageError(f"{engine} was built by {entry.library}, not {name}: leave --library out")
    _check_gpu(engine, entry)
    library = asked if isinstance(asked, EngineLibrary) else load_library(name)
    if library.version != entry.version:
        raise UsageError(
            f"{engine} was built by {entry.library} {entry.version}, and {library.version} is installed: install "
            "that version, or build the engine again"
        )
    if not hasattr(getattr(library.module, "SerializationFlag", None), "INCLUDE_REFIT"):
        raise UsageError(
            f"{library.name} {library.version} lacks SerializationFlag.INCLUDE_REFIT, and without it the engine "
            "couldn't be refitted again: update the library and build the engine again"
        )
    check_execution()
    return entry, library


def _check_gpu(engine: Path, entry: EngineEntry) -> None:
    gpu, targets = gpu_capability(), ", ".join(entry.compute_capabilities) or "the GPUs that the library chose"
    if gpu is None:
        raise UsageError(
            f"a refit runs the engine on a GPU, and no NVIDIA GPU or driver (libcuda.so.1) is found: refit {engine} "
            f"on a machine with one; the engine is for {targets}"
        )
    if entry.compute_capabilities and gpu not in entry.compute_capabilities:
        raise UsageError(
            f"{engine} is for {targets}, and this machine's GPU is {gpu}: refit it on its own kind of GPU, or build it "
            "again here"
        )


def _planned(folder: Path, engine: Path, entry: EngineEntry, edit: Edit, library: EngineLibrary, force: bool) -> _Job:
    """The new weights, every one checked, and the inputs of the comparison."""
    manifest = read_manifest(folder)
    data_file(manifest)
    arrays: dict[str, NDArray[Any]] = {}
    places: dict[str, WeightEntry] = {}
    for name, place, values in edited_initializers(folder, manifest, edit, force=force):
        arrays[name], places[name] = values, place
    plan = refit_plan(entry.refittable, arrays)
    if all(np.array_equal(values, _present(folder, places[name])) for name, values in arrays.items()):
        raise UsageError(f"{engine} has these weights already (its edit: {entry.edit or 'none'}): nothing to refit")
    inputs = check_inputs(entry, manifest.base, _changes(folder, arrays, places))
    return _Job(engine, entry, plan, inputs, library)


def _present(folder: Path, place: WeightEntry) -> NDArray[Any]:
    """An initialiser that lies in a data file, as it is on the disk."""
    assert place.data is not None  # data_file() refuses a folder where one lies in the graph
    dtype = np.dtype(place.dtype).newbyteorder("<")
    return np.memmap(folder / place.data, dtype, "r", offset=place.offset, shape=place.shape)


def _changes(
    folder: Path, arrays: dict[str, NDArray[Any]], places: dict[str, WeightEntry]
) -> Iterator[NDArray[np.float32]]:
    """What each weight (o, d) changes by, one at a time."""
    for name, values in arrays.items():
        change = values.astype(np.float32) - _present(folder, places[name]).astype(np.float32)
        yield change.T if places[name].transposed else change


def _checked_engine(job: _Job, onnx: Path, say: Callable[[str], None]) -> tuple[bytes, Parity]:
    """The refitted engine, serialised, and how far it is from the patched ONNX model, which is within the tolerance."""
    library, entry = job.library, job.entry
    say("running the patched ONNX model on the CPU")
    expected = onnx_outputs(onnx, job.inputs)
    say(f"refitting {len(job.plan.weights)} weights with {library.name} {library.version}")
    runtime = library.module.Runtime(library.logger)
    engine = open_engine(runtime, job.engine.read_bytes(), library)
    before = engine_outputs(EngineExecution(engine, library), entry, job.inputs)
    execute(job.plan, engine, library)
    data = serialized(engine, library)
    del engine  # the two needn't be in the GPU's memory at once
    say("comparing the refitted engine with the patched ONNX model")
    again = open_engine(runtime, data, library)
    if not again.refittable:
        raise ArtefactError("the refitted engine couldn't be refitted again; nothing was written, build a new one")
    after = engine_outputs(EngineExecution(again, library), entry, job.inputs)
    return data, compare(before, expected, after)


def _entry(entry: EngineEntry, edit: Edit, manifest: Manifest, data: bytes) -> EngineEntry:
    """The engine's entry after the refit; ``manifest`` is the patched folder's."""
    component = edit.metadata.component
    changes = {
        "excise": __version__,
        "edit": edit.id,
        "sources": {name: manifest.files[f"{component}/{name}"] for name in entry.sources},
        "engine": entry_of(memoryview(data)),
    }
    return entry.model_copy(update=changes)


def _write(
    partial: Path,
    edit: Edit,
    library: EngineLibrary,
    manifest: Manifest,
    entry: EngineEntry,
    data: bytes,
    figures: Parity,
) -> Refitted:
    """Put the engine and its JSON into the patched folder, and both and the figures into its manifest."""
    component = edit.metadata.component
    engine = partial / component / ENGINE
    engine.write_bytes(data)
    entry_path(engine).write_text(entry.to_json(), encoding="utf-8")
    parity = {f"{component}_refit_{name}": value for name, value in figures.dict().items()}
    measured = manifest.model_copy(update={"parity": parity})
    new = record_engines(partial, measured, library, {component: entry})
    for path in (engine, entry_path(engine), partial / NAME):
        with path.open("rb") as stream:
            os.fsync(stream.fileno())
    return Refitted(entry, new, figures)
