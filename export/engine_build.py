"""One TensorRT or TensorRT-RTX engine from one ONNX file.

The network is strongly typed: precisions are those of the ONNX file. Weights that a refit is to replace are marked one
by one (``REFIT_INDIVIDUAL``), under the names of their initialisers; everything else can be folded and fused as if it
were constant. ``REFIT_IDENTICAL`` is never set: with it, results are undefined once weights differ.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from excise import __version__
from excise.enginefile import EngineEntry, RefitEntry, TensorEntry, entry_of, entry_path, file_entry, network_name
from excise.errors import ArtefactError, UsageError
from excise.export.engine_library import EngineLibrary, gpu_capability
from excise.export.engine_options import EngineOptions, check_profiles
from excise.export.engine_progress import BuildProgress, interruptible, monitor
from excise.export.engine_timing import timing_cache
from excise.export.onnx_graph import load_graph
from excise.manifest import FileEntry, WeightEntry
from excise.onnx_metadata import read_edit_id
from excise.output import check_free, new_file

if TYPE_CHECKING:
    from onnx import ModelProto


def build_engine(
    onnx: Path,
    out: Path,
    options: EngineOptions,
    library: EngineLibrary,
    *,
    weights: Mapping[str, WeightEntry] | None = None,
    progress: Callable[[str], None] | None = None,
) -> EngineEntry:
    """Build ``out`` and, beside it, its JSON; both appear whole or not at all.

    Args:
        onnx: An ONNX file, with its data files beside it.
        out: A new file, in the ONNX file's folder if ``check_engine`` is to compare the two.
        options: Everything is checked against the ONNX file before the build.
        library: From ``load_library``.
        weights: What a refit is to replace, by torch name; all of it in ``onnx``. Only read with ``options.refit``.
        progress: Told each step, one line at a time; the build itself has a bar on stderr.

    Returns:
        The entry as written.

    Raises:
        OutputError: ``out`` or its JSON exists already, or can't be written.
        UsageError: An option doesn't fit the ONNX file, the library or this machine.
        ArtefactError: The ONNX file is missing or can't be read, or the library fails.
        MissingExtra: onnx isn't installed.
    """
    say = progress or (lambda message: None)
    for path in (out, entry_path(out)):
        check_free(path)
    marked = check_build(onnx, options, library, weights)
    sources = hash_sources(onnx, load_graph(onnx))
    edit_id = read_edit_id(onnx)
    say(f"building {out.name} from {onnx}")
    network, _parser, builder = _parsed(onnx, library)  # the parser owns the weights that the network refers to
    network.name = network_name(edit_id, refittable=bool(marked))
    config = _configured(builder, network, options, library)
    _mark(network, config, marked, library, onnx)
    plan = memoryview(_built(builder, network, config, options, library, onnx))
    entry = EngineEntry(
        excise=__version__,
        library=library.name,
        version=library.version,
        compute_capabilities=_targets(options, library),
        onnx=onnx.name,
        sources=sources,
        edit=edit_id,
        inputs=_tensors(network.num_inputs, network.get_input),
        outputs=_tensors(network.num_outputs, network.get_output),
        profiles=options.profiles,
        refittable={name: _refit_entry(place) for name, place in marked.items()},
        settings=_settings(options),
        engine=entry_of(plan),
    )
    with new_file(entry_path(out)) as described, new_file(out) as partial:
        described.write_text(entry.to_json(), encoding="utf-8")
        partial.write_bytes(plan)
    return entry


def built_alike(
    entry: EngineEntry, options: EngineOptions, library: EngineLibrary, marked: Mapping[str, WeightEntry]
) -> bool:
    """Whether a build with these options, from the same files, would be described by the same entry."""
    return (
        (entry.library, entry.version) == (library.name, library.version)
        and entry.compute_capabilities == _targets(options, library)
        and entry.profiles == options.profiles
        and entry.refittable == {name: _refit_entry(place) for name, place in marked.items()}
        and entry.settings == _settings(options)
    )


def _settings(options: EngineOptions) -> dict[str, bool | int | None]:
    """The options that change what is computed or how fast."""
    return options.model_dump(include={"tf32", "optimization_level", "workspace_mib"})


def check_build(
    onnx: Path,
    options: EngineOptions,
    library: EngineLibrary,
    weights: Mapping[str, WeightEntry] | None = None,
) -> Mapping[str, WeightEntry]:
    """What the build would refuse, found in an instant; the weights to mark.

    Raises:
        UsageError, ArtefactError, MissingExtra: as ``build_engine``.
    """
    gpu = gpu_capability()
    _check_targets(options, library, gpu)
    check_profiles(onnx, onnx_inputs(load_graph(onnx)), options.profiles)
    if options.timing_cache is not None and library.name == "tensorrt_rtx":
        raise UsageError("timing_cache: tensorrt-rtx has none, kernels are chosen on the user's GPU; leave it out")
    if not options.refit:
        return {}
    if not weights:
        raise UsageError(f"refit: true, and {onnx} has no weights that an edit can move: leave it out")
    if gpu is None:
        raise UsageError(
            f"refit: true needs a GPU: {library.name} compiles refittable weights on one, and none is found; build on "
            "a machine with a GPU, or take refit: false and build an engine for each edit"
        )
    if not hasattr(library.module.BuilderFlag, "REFIT_INDIVIDUAL"):
        raise UsageError(f"refit: true needs REFIT_INDIVIDUAL, which {library.name} {library.version} lacks: update it")
    return weights


def _check_targets(options: EngineOptions, library: EngineLibrary, gpu: str | None) -> None:
    wanted = options.compute_capabilities
    if library.name == "tensorrt":
        if wanted:
            raise UsageError(
                f"compute_capabilities: tensorrt builds for the GPU that it runs on, not for {wanted[0]}; leave it out"
            )
        if gpu is None:
            raise UsageError("tensorrt builds on the GPU that the engine is for, and none is found: take tensorrt-rtx")
        return
    known = library.targets()
    if unknown := [name for name in wanted if name not in known]:
        raise UsageError(f"compute_capabilities: {library.name} doesn't build for {unknown[0]}, but {', '.join(known)}")
    if len(set(wanted)) < len(wanted):
        raise UsageError(f"compute_capabilities: {', '.join(wanted)} names one twice")
    if gpu and not wanted and not library.runs_on(gpu):
        raise UsageError(
            f"this machine's GPU is {gpu}, which {library.name} doesn't run on: name the engine's GPUs in "
            f"compute_capabilities ({', '.join(known)}), or take tensorrt"
        )


def _targets(options: EngineOptions, library: EngineLibrary) -> tuple[str, ...]:
    """What the engine is for, as far as it is known."""
    gpu = gpu_capability() if library.name == "tensorrt" else None
    return options.compute_capabilities or ((gpu,) if gpu else ())


def hash_sources(onnx: Path, model: ModelProto) -> dict[str, FileEntry]:
    """Size and SHA-256 of the ONNX file and of its data files, by name.

    Raises:
        ArtefactError: A data file is missing.
    """
    tensors = [*model.graph.initializer]
    tensors += [attribute.t for node in model.graph.node for attribute in node.attribute if attribute.HasField("t")]
    names = {entry.value for tensor in tensors for entry in tensor.external_data if entry.key == "location"}
    if missing := [name for name in sorted(names) if not (onnx.parent / name).is_file()]:
        raise ArtefactError(f"{onnx} keeps weights in {missing[0]}, which isn't beside it: export again")
    return {name: file_entry(onnx.parent / name) for name in [onnx.name, *sorted(names)]}


def onnx_inputs(model: ModelProto) -> dict[str, TensorEntry]:
    """The inputs that an ONNX file declares, -1 where a dimension is free."""
    from onnx.helper import tensor_dtype_to_np_dtype

    held = {tensor.name for tensor in model.graph.initializer}
    inputs = {}
    for value in model.graph.input:
        tensor = value.type.tensor_type
        if value.name not in held:
            shape = tuple(dim.dim_value if dim.HasField("dim_value") else -1 for dim in tensor.shape.dim)
            inputs[value.name] = TensorEntry(dtype=str(tensor_dtype_to_np_dtype(tensor.elem_type)), shape=shape)
    return inputs


def _parsed(onnx: Path, library: EngineLibrary) -> tuple[Any, Any, Any]:
    """The network that the ONNX file holds, with its parser and builder, which have to live as long."""
    module = library.module
    with library.listening() as heard:
        builder = module.Builder(library.logger)
        network = builder.create_network(1 << int(module.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
        parser = module.OnnxParser(network, library.logger)
        if not parser.parse_from_file(str(onnx)):
            raise ArtefactError(f"{onnx} can't be read: {library.failure('the parser refused it', heard)}")
    return network, parser, builder


def _configured(builder: Any, network: Any, options: EngineOptions, library: EngineLibrary) -> Any:
    module = library.module
    with library.listening() as heard:
        config = builder.create_builder_config()
        config.builder_optimization_level = options.optimization_level
        if not options.tf32:
            config.clear_flag(module.BuilderFlag.TF32)
        if options.workspace_mib is not None:
            config.set_memory_pool_limit(module.MemoryPoolType.WORKSPACE, options.workspace_mib << 20)
        if options.compute_capabilities:
            config.num_compute_capabilities = len(options.compute_capabilities)
        for index, name in enumerate(options.compute_capabilities):
            if not config.set_compute_capability(getattr(module.ComputeCapability, name), index):
                raise library.failure(f"compute_capabilities: {name} is refused", heard)
        for profile in options.profiles:
            ranges = builder.create_optimization_profile()
            for name, shapes in profile.items():
                ranges.set_shape(name, shapes.min, shapes.opt, shapes.max)
            if config.add_optimization_profile(ranges) < 0:
                raise library.failure(f"the profile of {', '.join(profile)} is refused", heard)
    return config


def _mark(network: Any, config: Any, weights: Mapping[str, WeightEntry], library: EngineLibrary, onnx: Path) -> None:
    """Mark the weights that a refit replaces, and nothing else."""
    if weights:
        config.set_flag(library.module.BuilderFlag.REFIT_INDIVIDUAL)
    for name, place in weights.items():
        if not network.mark_weights_refittable(place.initializer):
            raise ArtefactError(
                f"{name} can't be made refittable: {library.name} finds no weights {place.initializer} in {onnx}; "
                "export again"
            )


def _built(builder: Any, network: Any, config: Any, options: EngineOptions, library: EngineLibrary, onnx: Path) -> Any:
    """The serialised engine, with a bar on stderr for a build of over two seconds."""
    done = BuildProgress()
    format_ = "{desc}: {percentage:3.0f}%|{bar}| {elapsed}"
    with (
        tqdm(total=1.0, desc=f"engine of {onnx.parent.name}", bar_format=format_, leave=False, delay=2) as bar,
        timing_cache(config, options.timing_cache, library),
        library.listening() as heard,
    ):
        if hasattr(library.module, "IProgressMonitor"):
            config.progress_monitor = monitor(library.module, done, bar)
        with interruptible(done):
            plan = builder.build_serialized_network(network, config)
        if plan is None:
            raise library.failure(f"no engine could be built from {onnx}", heard)
    return plan


def _tensors(number: int, get: Callable[[int], Any]) -> dict[str, TensorEntry]:
    found = [get(index) for index in range(number)]
    return {one.name: TensorEntry(dtype=_dtype(one.dtype), shape=tuple(one.shape)) for one in found}


def _dtype(dtype: Any) -> str:
    """NumPy's name of a type, or the library's own where NumPy has none."""
    names = {"FLOAT": "float32", "HALF": "float16", "INT32": "int32", "INT64": "int64", "INT8": "int8", "BOOL": "bool"}
    return names.get(dtype.name, str(dtype.name).lower())


def _refit_entry(place: WeightEntry) -> RefitEntry:
    return RefitEntry(
        initializer=place.initializer,
        engine_weight=place.initializer,
        transposed=place.transposed,
        dtype=place.dtype,
        shape=place.shape,
    )
