"""The command that builds engines, and the options by which ``excise export`` does."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from excise.cli_vector_timestep import has_scalar_timestep, with_vector_timestep
from excise.console import json_option, needs, result, say
from excise.errors import UsageError

if TYPE_CHECKING:
    from excise.enginefile import EngineEntry

F = TypeVar("F", bound=Callable[..., Any])

_LIBRARIES = click.Choice(["tensorrt", "tensorrt-rtx"])
#: Triton's TensorRT backend is linked with TensorRT, and loads no engine of TensorRT-RTX.
_USUAL, _TRITONS = "tensorrt-rtx", "tensorrt"


def engine_options(function: F) -> F:
    """``--engine`` and ``--engine-options`` of a command that writes an ONNX folder; see ``optional_builder``."""
    options: list[Callable[[F], F]] = [
        click.option("--engine", type=_LIBRARIES, help="Also build TensorRT engines beside the ONNX files."),
        click.option(
            "--engine-options", type=click.Path(path_type=Path), help="Shapes, GPUs and refit of the engines, as YAML."
        ),
    ]
    for option in reversed(options):
        function = option(function)
    return function


def builder(library: str, options_file: Path | None) -> Callable[..., dict[str, EngineEntry]]:
    """What builds a folder's engines, with its library loaded and its options read before any long work.

    The result takes the folder, and ``out``, ``rebuild`` and ``progress`` of ``build_engines``.

    Raises:
        UsageError: The options can't be used.
        MissingExtra: The library isn't installed.
    """
    with needs():
        from excise.export.engine_library import load_library
        from excise.export.engine_options import PipelineOptions, read_options
        from excise.export.engine_pipeline import build_engines
    options = PipelineOptions() if options_file is None else read_options(options_file, PipelineOptions)
    loaded = load_library(library)

    def build(folder: Path, **where: Any) -> dict[str, EngineEntry]:
        return build_engines(folder, loaded, options, **{"progress": say, **where})

    return build


def optional_builder(library: str | None, options_file: Path | None) -> Callable[..., dict[str, EngineEntry]] | None:
    """``builder`` for ``--engine`` and ``--engine-options``; ``None`` where neither is given."""
    if library is None and options_file is not None:
        raise UsageError(f"--engine-options {options_file} needs --engine: name tensorrt or tensorrt-rtx")
    return None if library is None else builder(library, options_file)


@click.command()
@click.argument("onnx_dir", type=click.Path(path_type=Path))
@click.option("--library", type=_LIBRARIES, help=f"{_USUAL} by default; with --for-triton {_TRITONS}.")
@click.option(
    "--for-triton",
    is_flag=True,
    help="For serve build --backend tensorrt: the UNet takes its timestep with shape (1), not as a scalar.",
)
@click.option(
    "--options", "options_file", type=click.Path(path_type=Path), help="Shapes, GPUs and refit of the engines, as YAML."
)
@click.option("--out", type=click.Path(path_type=Path), help="A new folder; by default ONNX_DIR is replaced.")
@click.option("--rebuild", is_flag=True, help="Build engines anew that ONNX_DIR has already.")
@json_option
def engines(
    onnx_dir: Path,
    library: str | None,
    for_triton: bool,
    options_file: Path | None,
    out: Path | None,
    rebuild: bool,
    as_json: bool,
) -> None:
    """Build a TensorRT engine of each of ONNX_DIR's models, with its description model.engine.json.

    TensorRT-RTX needs no GPU to build; TensorRT builds on the GPU that it is for. Engines that can be refitted
    (refit: true among the options) need a GPU with either. ONNX_DIR is replaced in one step, when all engines are
    there. An engine that was built from the same files with the same options stays: after excise patch --out the
    denoiser's alone is built.

    --for-triton writes the UNet's graph anew, too, with one node more and the same outputs bit for bit; the folder is
    patched and served like any other. That needs --out, and ONNX_DIR stays as it is. A folder that has such a UNet
    already is taken as it is, and may be replaced.

    \b
    Examples:
      excise engines sd-onnx
      excise engines sd-onnx --library tensorrt --options engines.yaml --out sd-engines
      excise engines sd-onnx --for-triton --out sd-engines
    An options file:
      images: {min: 1, opt: 1, max: 4}
      compute_capabilities: [SM89, SM120]
    """
    place = onnx_dir if out is None else out
    if not for_triton:
        entries = builder(library or _USUAL, options_file)(onnx_dir, out=out, rebuild=rebuild)
    else:
        entries = _for_triton(onnx_dir, library or _TRITONS, options_file, out, rebuild)
    lines = [f"{place}", *(f"  {name:<13} {_described(entry)}" for name, entry in sorted(entries.items()))]
    document = {
        "folder": str(place),
        "engines": {name: entry.model_dump(mode="json") for name, entry in entries.items()},
    }
    result(document, "\n".join(lines), as_json)


def _for_triton(
    onnx_dir: Path, library: str, options_file: Path | None, out: Path | None, rebuild: bool
) -> dict[str, EngineEntry]:
    """As ``build_engines``, of the folder with a UNet that Triton takes. Messages name the folder that was given."""
    if library != _TRITONS:
        raise UsageError(f"--for-triton --library {library}: Triton loads engines of {_TRITONS} alone: leave it out")
    if out is None and has_scalar_timestep(onnx_dir):
        new = shlex.quote(str(engines_folder(onnx_dir)))
        raise UsageError(f"--for-triton would change the UNet's graph in {onnx_dir}: give a new folder, --out {new}")
    build = builder(library, options_file)
    with nullcontext(onnx_dir) if out is None else with_vector_timestep(onnx_dir, out) as folder:

        def progress(line: str) -> None:
            say(line.replace(str(folder), str(onnx_dir)))

        return build(folder, out=out, rebuild=rebuild, progress=progress)


def engines_folder(onnx_dir: Path) -> Path:
    """The name that messages give to a new folder with the engines of ``onnx_dir``, beside it."""
    named = onnx_dir if onnx_dir.name not in ("", "..") else onnx_dir.resolve()
    return named.with_name(f"{named.name}-engines")


def _described(entry: EngineEntry) -> str:
    """An engine on one line."""
    target = ", ".join(entry.compute_capabilities) or "the library's own GPUs"
    refit = f"{len(entry.refittable)} weights can be refitted" if entry.refittable else "no refit"
    edit = f"edit {entry.edit[:12]}" if entry.edit else "no edit"
    return f"{entry.library} {entry.version} for {target}; {edit}; {refit}; {entry.engine.size / 1e6:.1f} MB"
