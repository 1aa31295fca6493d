"""Engines of a whole exported pipeline, beside its ONNX files.

    unet/model.engine   unet/model.engine.json
    text_encoder/…      vae_decoder/…

Shapes that an export leaves free follow from how the pipeline is run: n prompts, n decoded latents, and n rows in the
UNet, or 2n with guidance, whose two halves are one batch (Ho & Salimans 2022).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from excise.enginefile import ENGINE, EngineEntry, Range, TensorEntry, check_engine, entry_path, read_engine
from excise.errors import ArtefactError, OutputError, UsageError
from excise.export.engine_build import build_engine, built_alike, check_build, onnx_inputs
from excise.export.engine_library import EngineLibrary, load_library
from excise.export.engine_options import EngineOptions, PipelineOptions, Profile
from excise.export.onnx_graph import load_graph
from excise.export.patch import fill
from excise.manifest import NAME, Manifest, WeightEntry, read_manifest, verify, write_manifest
from excise.output import new_folder, replaced_folder

MODEL = "model.onnx"
_ALWAYS = ("text_encoder", "vae_decoder")
_UNUSED = "vae_encoder"  # images are made from noise
_BATCHED = ("input_ids", "latent_sample", "sample", "timestep", "encoder_hidden_states", "text_embeds", "time_ids")


def components(folder: Path) -> tuple[str, ...]:
    """The models of an exported pipeline that making an image runs, sorted.

    Raises:
        ArtefactError: It has no text encoder, decoder or denoiser.
    """
    found = sorted(path.parent.name for path in folder.glob(f"*/{MODEL}") if path.parent.name != _UNUSED)
    denoiser = "transformer" if "transformer" in found else "unet"
    if missing := [name for name in (*_ALWAYS, denoiser) if name not in found]:
        raise ArtefactError(f"{folder} has no {missing[0]}/{MODEL}: name a folder that excise export wrote")
    return tuple(found)


def build_engines(
    folder: Path,
    library: str | EngineLibrary,
    options: PipelineOptions | None = None,
    *,
    out: Path | None = None,
    rebuild: bool = False,
    progress: Callable[[str], None] | None = None,
) -> dict[str, EngineEntry]:
    """Build an engine of each of ``components`` beside its ONNX file and write it into the manifest.

    Everything that can be refused is, before the first build. The folder changes in one step, when all are there. An
    engine that is there, was built with these options and from these files, stays: after ``excise patch --out``, which
    leaves the denoiser's behind, that one alone is built.

    Args:
        folder: What ``excise export`` or ``excise patch`` wrote.
        library: ``tensorrt`` or ``tensorrt-rtx``, or one that is loaded.
        options: By default static image size, one to four images.
        out: A new folder, which shares unchanged files by hard links; by default ``folder`` itself is replaced.
        rebuild: Leave all engines that ``folder`` has behind, and build new ones.
        progress: Told each step, one line at a time; each build has a bar on stderr.

    Returns:
        The engines' entries by component.

    Raises:
        ArtefactError: ``folder`` is incomplete or altered, or the library fails.
        UsageError: An option doesn't fit the model, the library or this machine.
        OutputError: Without ``rebuild``, an engine is stale or was built with other options, or all are there; or
            ``out`` can't be written.
        MissingExtra: The library or onnx isn't installed.
    """
    say = progress or (lambda message: None)
    loaded = load_library(library) if isinstance(library, str) else library
    manifest = read_manifest(folder)
    names = components(folder)
    say(f"checking {folder}")
    if problems := [line for line in verify(folder) if not line.endswith("is not in the manifest")]:
        raise ArtefactError(f"{folder}: {problems[0]}; export again")
    plans = _plans(folder, names, options or PipelineOptions(), loaded, manifest)
    entries = {} if rebuild else _kept(folder, plans, loaded)
    for name in entries:
        say(f"{name}/{ENGINE} stays: it was built from these files with these options")
    place: AbstractContextManager[Path] = replaced_folder(folder) if out is None else new_folder(out)
    with place as partial:
        fill(folder, partial, link=True)
        for name, (engine_options, weights) in plans.items():
            if name in entries:
                continue
            engine = partial / name / ENGINE
            for old in (engine, entry_path(engine)):
                old.unlink(missing_ok=True)
            say(f"building {name}/{ENGINE} with {loaded.name} {loaded.version}")
            onnx = engine.with_name(MODEL)
            entries[name] = build_engine(onnx, engine, engine_options, loaded, weights=weights)
        (partial / NAME).unlink()  # a link to the old one
        record_engines(partial, manifest, loaded, entries)
    return {name: entries[name] for name in plans}


Plans = Mapping[str, tuple[EngineOptions, dict[str, WeightEntry]]]


def _kept(folder: Path, plans: Plans, library: EngineLibrary) -> dict[str, EngineEntry]:
    """The entries of engines that are there and needn't be built.

    Raises:
        OutputError: One is stale, damaged or built with other options, or all are there: only ``rebuild`` replaces any.
    """
    entries = {}
    for name, (options, weights) in plans.items():
        engine = folder / name / ENGINE
        if not engine.exists():
            continue
        try:
            problems = check_engine(engine)
        except ArtefactError as error:
            raise OutputError(f"{error}: build it anew with --rebuild") from error
        if problems:
            raise OutputError(f"{problems[0]}, with --rebuild")
        entries[name] = read_engine(engine)
        if not built_alike(entries[name], options, library, weights if options.refit else {}):
            raise OutputError(f"{engine} exists already, built with other options: build it anew with --rebuild")
    if len(entries) == len(plans):
        raise OutputError(f"{folder} has an engine of each of its models already: build them anew with --rebuild")
    return entries


def _plans(
    folder: Path, names: tuple[str, ...], options: PipelineOptions, library: EngineLibrary, manifest: Manifest
) -> dict[str, tuple[EngineOptions, dict[str, WeightEntry]]]:
    """Options and refittable weights of each component, every one checked."""
    if unknown := [name for name in options.profiles if name not in names]:
        raise UsageError(f"profiles: {unknown[0]!r} is no component: these are {', '.join(names)}")
    if options.refit and not manifest.weights:
        raise UsageError(f"refit: true, and {folder}'s manifest names no weights that an edit can move: export again")
    plans = {}
    for name in names:
        onnx = folder / name / MODEL
        weights = {one: place for one, place in manifest.weights.items() if place.file == f"{name}/{MODEL}"}
        profiles = options.profiles.get(name)
        if profiles is None:
            profiles = _usual_profiles(folder, name, onnx_inputs(load_graph(onnx)), options)
        engine_options = options.of_engine(profiles, refit=options.refit and bool(weights))
        check_build(onnx, engine_options, library, weights)
        plans[name] = engine_options, weights
    return plans


def _usual_profiles(
    folder: Path, component: str, inputs: Mapping[str, TensorEntry], options: PipelineOptions
) -> tuple[Profile, ...]:
    """The profile of the pipeline's own image size and text length, for ``options.images``; none for fixed shapes."""
    images = options.images
    rows = (images.min, images.opt, images.max)
    if component == "unet":
        # One row for each image without guidance, two with it, which is the usual case.
        rows = (images.min, 2 * images.opt, 2 * images.max)
    profile = {}
    for name, tensor in inputs.items():
        if -1 in tensor.shape:
            rest = _sizes(folder, component, name, tensor.shape)
            low, best, high = ((count if tensor.shape[0] == -1 else tensor.shape[0], *rest) for count in rows)
            profile[name] = Range(min=low, opt=best, max=high)
    return (profile,) if profile else ()


def _sizes(folder: Path, component: str, name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The dimensions of an input behind its batch, free ones from the configurations."""
    wanted = shape[1:].count(-1)
    known: list[int] = []
    if wanted and name == "input_ids":
        known = [_config(folder, component, "max_position_embeddings")]
    elif wanted and name == "encoder_hidden_states" and component == "unet":
        known = [_config(folder, "text_encoder", "max_position_embeddings")]
    elif wanted and name in ("sample", "latent_sample") and (folder / "unet").is_dir():
        size = _config(folder, "unet", "sample_size")
        known = list(size) if isinstance(size, list) else [size, size]
    if component == "transformer" or name not in _BATCHED or len(known) != wanted:
        raise UsageError(f"{folder}/{component} has a free shape in {name} that images: doesn't give: give profiles")
    sizes = iter(known)
    return tuple(next(sizes) if dimension == -1 else dimension for dimension in shape[1:])


def _config(folder: Path, component: str, key: str) -> Any:
    path = folder / component / "config.json"
    try:
        value = json.loads(path.read_bytes())[key]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ArtefactError(f"{path} has no {key}: give profiles with shapes of your own, or export again") from error
    return value


def record_engines(
    folder: Path, manifest: Manifest, library: EngineLibrary, entries: Mapping[str, EngineEntry]
) -> Manifest:
    """Write the manifest with the engines among its files, and the engine's name of every refittable weight."""
    names = {name: place.engine_weight for entry in entries.values() for name, place in entry.refittable.items()}
    weights = {
        name: entry.model_copy(update={"engine_weight": names.get(name)}) for name, entry in manifest.weights.items()
    }
    engines = {f"{name}/{file}" for name in entries for file in (ENGINE, f"{ENGINE}.json")}
    return write_manifest(
        folder,
        kind=manifest.kind,
        base=manifest.base,
        edit=manifest.edit,
        weights=weights,
        base_weights=manifest.base_weights,
        parity=manifest.parity,
        tools={**manifest.tools, library.name: library.version},
        known={path: entry for path, entry in manifest.files.items() if path not in engines},
    )
