"""The commands of ``excise serve`` that make and change a Triton model repository."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from excise.cli_vector_timestep import has_scalar_timestep, vector_timestep_source, with_vector_timestep
from excise.console import force_option, json_option, result, say
from excise.errors import ArtefactError, UsageError

if TYPE_CHECKING:
    from excise.serve.edit_policy import EditPolicy
    from excise.serve.repository_record import Record
    from excise.serve.triton_control import TritonServer
    from excise.serve.version_folder import Recorder

_repository = click.argument("repo", type=click.Path(path_type=Path))
_policy = click.option(
    "--policy", "policy_file", type=click.Path(path_type=Path), help="Which tenant may choose which edit (JSON, YAML)."
)
_edit_names = click.option(
    "--edit-name", "edit_names", multiple=True, metavar="NAME=ID", help="Call the edit of that id NAME; repeatable."
)
_canary = click.option("--canary/--no-canary", default=True, help="Record what the model makes of fixed prompts.")
_canary_prompts = click.option(
    "--canary-prompt",
    "canary_prompts",
    multiple=True,
    help="A prompt of what is erased, for the canary; by default the edit's own concepts. Repeatable.",
)
_url = click.option("--url", help="Triton's HTTP address: tell it, and wait until the version is ready.")
_timeout = click.option(
    "--timeout",
    type=click.FloatRange(min=1),
    default=600.0,
    show_default=True,
    help="With --url: seconds a load may take.",
)


@click.command()
@click.argument("onnx_dir", type=click.Path(path_type=Path))
@click.option("--out", required=True, type=click.Path(path_type=Path), help="The repository to write.")
@click.option("--name", default="excise", show_default=True, help="The pipeline's model name.")
@click.option(
    "--backend",
    type=click.Choice(["python", "onnxruntime", "tensorrt"]),
    default="python",
    show_default=True,
    help="What runs the networks: ONNX Runtime inside Triton's Python backend, or a Triton backend of their own.",
)
@click.option("--with-base", is_flag=True, help="The unedited model may be served too.")
@_policy
@_edit_names
@click.option("--max-batch", type=click.IntRange(min=1), default=8, show_default=True, help="Images of one batch.")
@click.option("--batch-delay", type=click.IntRange(min=0), default=0, show_default=True, help="Wait for it, in µs.")
@click.option("--queue", type=click.IntRange(min=0), default=64, show_default=True, help="Requests that may wait.")
@click.option("--queue-timeout", type=float, default=60.0, show_default=True, help="Seconds that one may wait.")
@click.option("--instances", type=click.IntRange(min=1), default=1, show_default=True, help="Copies of the pipeline.")
@click.option("--gpu", "gpus", multiple=True, type=click.IntRange(min=0), help="A GPU's number; repeatable.")
@click.option("--provider", type=click.Choice(["cpu", "cuda", "tensorrt"]), help="Of ONNX Runtime; with --gpu cuda.")
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads of an operator.")
@click.option("--max-steps", type=click.IntRange(min=1), default=100, show_default=True, help="Refuse more.")
@click.option(
    "--stream-every", type=click.IntRange(min=0), default=0, show_default=True, help="Steps from preview to preview."
)
@click.option("--resource", "resources", multiple=True, metavar="NAME=COUNT", help="Of the rate limiter; repeatable.")
@click.option("--warmup/--no-warmup", default=True, help="Triton sends a request before the model is ready.")
@_canary
@_canary_prompts
@click.option("--copy", is_flag=True, help="Copy the files in place of hard links.")
@json_option
def build(
    onnx_dir: Path,
    out: Path,
    name: str,
    backend: str,
    with_base: bool,
    policy_file: Path | None,
    edit_names: tuple[str, ...],
    max_batch: int,
    batch_delay: int,
    queue: int,
    queue_timeout: float,
    instances: int,
    gpus: tuple[int, ...],
    provider: str | None,
    threads: int | None,
    max_steps: int,
    stream_every: int,
    resources: tuple[str, ...],
    warmup: bool,
    canary: bool,
    canary_prompts: tuple[str, ...],
    copy: bool,
    as_json: bool,
) -> None:
    """Write a Triton model repository of ONNX_DIR, which excise export, patch, bank or engines wrote.

    The edit's id, the manifest's hash and the table of versions are parameters of the model's configuration. The
    unedited model is never served without --with-base. For backend onnxruntime, a UNet whose timestep is a scalar
    gets one of shape (1), which Triton needs (extra export); for tensorrt, excise engines --for-triton builds engines
    that have it.

    \b
    Examples:
      excise serve build sd-onnx --out models
      excise serve build sd-bank --out models --policy tenants.json --gpu 0
      excise engines sd-onnx --for-triton --out sd-engines
      excise serve build sd-engines --out models --backend tensorrt --gpu 0
      tritonserver --model-repository=models --model-control-mode=explicit --load-model=excise
    """
    from pydantic import ValidationError

    from excise.manifest import first_problem
    from excise.serve.triton_options import TritonOptions
    from excise.serve.triton_repository import build as build_repository

    runs = provider or ("cuda" if gpus and backend == "python" else "cpu")
    try:
        options = TritonOptions.model_validate(
            {
                "name": name,
                "backend": backend,
                "max_batch_size": max_batch,
                "max_queue_delay_microseconds": batch_delay,
                "max_queue_size": queue,
                "queue_timeout_seconds": queue_timeout,
                "instances": instances,
                "gpus": gpus,
                "provider": runs,
                "threads": threads,
                "max_steps": max_steps,
                "stream_every": stream_every,
                "warmup": warmup,
                "resources": _pairs("--resource", resources),
            }
        )
    except ValidationError as error:
        raise UsageError(first_problem(error)) from error
    policy, names = _loaded(policy_file), _pairs("--edit-name", edit_names)
    if backend == "tensorrt":
        _check_engines(onnx_dir)
    with with_vector_timestep(onnx_dir, out) if backend == "onnxruntime" else nullcontext(onnx_dir) as folder:
        record = build_repository(
            folder,
            out,
            options,
            with_base=with_base,
            policy=policy,
            names=names,
            link=not copy,
            canary=_recorder(canary, canary_prompts),
            progress=lambda line: say(line.replace(str(folder), str(onnx_dir))),
        )
    _report(out, record, as_json)


@click.command()
@_repository
@click.option("--edit", "edit_file", type=click.Path(path_type=Path), help="Put this edit in place of the present one.")
@click.option("--from", "folder", type=click.Path(path_type=Path), help="Serve this exported folder: a bank, engines.")
@_policy
@_edit_names
@click.option("--keep", type=click.IntRange(min=1), help="Remove all but so many versions (never the last two served).")
@_canary
@_canary_prompts
@_url
@_timeout
@force_option
@json_option
def promote(
    repo: Path,
    edit_file: Path | None,
    folder: Path | None,
    policy_file: Path | None,
    edit_names: tuple[str, ...],
    keep: int | None,
    canary: bool,
    canary_prompts: tuple[str, ...],
    url: str | None,
    timeout: float,
    force: bool,
    as_json: bool,
) -> None:
    """Add a version with another edit to REPO, and serve it.

    Only what the edit moves is written; the rest is hard links to the present version. The switch is one rename: killed
    at any moment, REPO serves the old version or the new one. With --url a running Triton loads the new version beside
    the old one and then switches; if it refuses, nothing has changed. Without it, Triton has to be told.

    \b
    Examples:
      excise serve promote models --edit van-gogh.safetensors --url http://127.0.0.1:8000
      excise serve promote models --from sd-bank-2 --policy tenants.json --keep 3
    """
    from excise.serve.triton_repository import promote as promote_repository

    if (edit_file is None) == (folder is None):
        raise UsageError("give --edit or --from, one of them")
    prompts = canary_prompts or _concepts(edit_file)
    with _server(url, timeout) as server:
        source = _finished(repo, folder) if folder is not None else _patched(edit_file, force)
        record = promote_repository(
            repo,
            source,
            policy=_loaded(policy_file),
            names=_pairs("--edit-name", edit_names),
            keep=keep,
            canary=_recorder(canary, prompts),
            server=server,
            progress=say,
        )
    _report(repo, record, as_json)


@click.command()
@_repository
@click.option("--to", type=click.IntRange(min=1), help="A version; by default the one that was served before.")
@_url
@_timeout
@json_option
def rollback(repo: Path, to: int | None, url: str | None, timeout: float, as_json: bool) -> None:
    """Serve an earlier version of REPO again. Nothing is removed.

    Each rollback goes one version further back; --to goes to any, and may be repeated without harm.

    \b
    Examples:
      excise serve rollback models --url http://127.0.0.1:8000
      excise serve rollback models --to 3
    """
    from excise.serve.triton_repository import rollback as roll_back

    with _server(url, timeout) as server:
        record = roll_back(repo, to=to, server=server, progress=say)
    _report(repo, record, as_json)


@click.command()
@_repository
@_url
@_timeout
@json_option
def status(repo: Path, url: str | None, timeout: float, as_json: bool) -> None:
    """Say which versions REPO has, which is served, and what a running Triton says of them.

    \b
    Examples:
      excise serve status models
      excise serve status models --url http://127.0.0.1:8000 --json
    """
    from excise.serve.repository_record import read_record

    record = read_record(repo)
    states = None
    with _server(url, timeout) as server:
        if server is not None:
            states = server.versions(record.model)
    _report(repo, record, as_json, states)


@click.command()
@_repository
@json_option
def check(repo: Path, as_json: bool) -> None:
    """Check REPO without a Triton; exit 1 if its load would fail.

    Configurations are compared with Triton's schema (if tritonclient is installed) and with the networks, every file
    with its manifest, every version with the record. What nothing here can load is said.

    \b
    Examples:
      excise serve check models
    """
    from excise.serve.repository_check import check as check_repository

    found = check_repository(repo)
    lines = [f"{repo}: {'sound' if not found.problems else f'{len(found.problems)} problems'}"]
    lines += [f"  problem   {line}" for line in found.problems] + [f"  note      {line}" for line in found.notes]
    document = {"repository": str(repo), "sound": not found.problems, **found.to_json()}
    result(document, "\n".join(lines), as_json)
    if found.problems:
        sys.exit(1)


def _finished(repo: Path, folder: Path) -> Path | Callable[[Path, Path], object]:
    """An exported folder for a version, or what writes it as Triton's ONNX Runtime backend takes it."""
    from excise.serve.repository_record import read_record

    backend = read_record(repo).backend
    if backend == "tensorrt":
        _check_engines(folder)
    if backend != "onnxruntime" or not has_scalar_timestep(folder):
        return folder
    return vector_timestep_source(folder)


def _check_engines(folder: Path) -> None:
    """Raise ``ArtefactError``, with the command that puts it right, for a folder without engines that Triton takes."""
    from excise.cli_engine import engines_folder
    from excise.enginefile import ENGINE

    if has_scalar_timestep(folder):
        problem = "its UNet takes a scalar timestep, and Triton takes no scalar"
    elif (folder / "unet" / "model.onnx").is_file() and not (folder / "unet" / ENGINE).is_file():
        problem = f"it has no unet/{ENGINE}"
    else:
        return
    given, made = shlex.quote(str(folder)), shlex.quote(str(engines_folder(folder)))
    raise ArtefactError(f"{folder}: {problem}: excise engines {given} --for-triton --out {made}, and name that folder")


def _patched(edit_file: Path | None, force: bool) -> Callable[[Path, Path], object]:
    """What writes the present export with another edit to a new folder."""
    from excise.editfile import load_edit
    from excise.export.patch import patch

    if edit_file is None:
        raise UsageError("give --edit")
    edit = load_edit(edit_file)

    def write(present: Path, out: Path) -> object:
        return patch(present, edit, out=out, force=force, progress=say)

    return write


def _concepts(edit_file: Path | None) -> tuple[str, ...]:
    """What an edit erases, in full: the manifest's summary names the first ones only."""
    if edit_file is None:
        return ()
    from excise.editfile import load_edit

    return tuple(concept.erase for concept in load_edit(edit_file).metadata.concepts)[:4]


def _recorder(wanted: bool, prompts: tuple[str, ...]) -> Recorder | None:
    if not wanted:
        return None
    from excise.manifest import read_manifest
    from excise.serve.canary import record
    from excise.serve.edit_names import erased

    def write(onnx: Path, folder: Path) -> None:
        record(onnx, erased=prompts or erased(read_manifest(onnx))).write(folder)

    return write


def _loaded(policy_file: Path | None) -> EditPolicy | None:
    if policy_file is None:
        return None
    from excise.serve.edit_policy import load_policy

    return load_policy(policy_file)


def _server(url: str | None, timeout: float) -> AbstractContextManager[TritonServer | None]:
    if url is None:
        return nullcontext()
    from excise.serve.triton_control import TritonServer

    return TritonServer(url, timeout=timeout)


def _pairs(option: str, given: tuple[str, ...]) -> dict[str, str]:
    """``NAME=VALUE`` options as a dictionary."""
    pairs: dict[str, str] = {}
    for one in given:
        name, equals, value = one.partition("=")
        if not equals or not name or not value or name in pairs:
            raise UsageError(f"{option} {one!r}: give NAME=VALUE, each name once")
        pairs[name] = value
    return pairs


def _report(repo: Path, record: Record, as_json: bool, states: dict[str, str] | None = None) -> None:
    from excise.serve.repository_text import record_lines

    document: dict[str, Any] = {"repository": str(repo), "record": json.loads(record.to_json())}
    if states is not None:
        document["server"] = states
    result(document, "\n".join([str(repo), *record_lines(record, states)]), as_json)
