"""The command ``excise serve``: its own server here, and what Triton needs in ``cli_serve_build``."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from excise.console import needs, say
from excise.errors import MissingExtra, UsageError

if TYPE_CHECKING:
    from excise.serve.batch_engine import BatchEngine
    from excise.serve.edit_policy import EditPolicy
    from excise.serve.engine import Served
    from excise.serve.http_settings import ServerSettings
    from excise.serve.listener import Tls

#: The argument that stands for the bundled model, and its bank's edits in the order of their rows.
DEMO, DEMO_EDITS = "demo", ("weapons", "gun")
KEYS_ENV = "EXCISE_API_KEYS"

#: In ``excise.cli_serve_build``.
_REPOSITORY = ("build", "promote", "rollback", "status", "check")
_ENGINE_OPTIONS = (
    *("provider", "device", "engine_cache", "threads", "max_batch", "batch_delay"),
    *("with_base", "verify_files"),
)
_LOCAL = ("127.", "::1", "localhost")


class _ServeGroup(click.Group):
    """Knows the commands on Triton's repositories by name, and imports them when they are asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted([*super().list_commands(ctx), *_REPOSITORY])

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _REPOSITORY:
            return super().get_command(ctx, cmd_name)
        command: click.Command = getattr(importlib.import_module("excise.cli_serve_build"), cmd_name)
        return command


@click.group(cls=_ServeGroup)
def serve() -> None:
    """Serve an exported model: with the embedded server (run), or from a Triton model repository (build).

    \b
    Examples:
      excise serve run demo
      excise serve build sd-onnx --out repository
      excise serve promote repository --edit another.safetensors --url http://127.0.0.1:8000
    """


@serve.command()
@click.argument("onnx_dir", metavar="DIR")
@click.option("--host", default="127.0.0.1", show_default=True, help="The address to listen on; 0.0.0.0 is all.")
@click.option("--port", type=click.IntRange(0, 65535), default=8000, show_default=True, help="0 takes a free one.")
@click.option("--provider", type=click.Choice(["cpu", "cuda", "tensorrt"]), default="cpu", show_default=True)
@click.option("--device", type=click.IntRange(min=0), default=0, help="The GPU's number.")
@click.option("--engine-cache", type=click.Path(path_type=Path), help="Where the tensorrt provider keeps its engines.")
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads of the model; all cores by default.")
@click.option("--max-batch", type=click.IntRange(min=1), default=8, show_default=True, help="Images at a time.")
@click.option("--batch-delay", type=float, default=0.0, help="Seconds to wait for a batch to fill up; none by default.")
@click.option("--queue", type=click.IntRange(min=1), default=64, show_default=True, help="Images that may wait.")
@click.option("--deadline", type=float, help="Seconds within which an image has to be ready; any by default.")
@click.option("--max-steps", type=click.IntRange(min=1), default=100, show_default=True, help="Of one image.")
@click.option("--name", help="What clients call the model; the folder's name by default.")
@click.option("--edit", "edit_file", type=click.Path(path_type=Path), help="Take this edit in place of the folder's.")
@click.option("--edit-name", "edit_names", multiple=True, metavar="NAME=ID", help="Call an edit NAME; repeatable.")
@click.option("--default-edit", metavar="NAME", help="For requests that name no edit; the first one by default.")
@click.option("--with-base", is_flag=True, help="Serve the unedited model, too.")
@click.option("--verify/--no-verify", "verify_files", default=True, help="Compare the files with the manifest first.")
@click.option(
    "--api-key-file",
    "key_files",
    multiple=True,
    type=click.Path(path_type=Path),
    help=f"A file of keys, one a line, each with its tenant behind it; repeatable. Also the variable {KEYS_ENV}.",
)
@click.option(
    "--policy",
    "policy_file",
    type=click.Path(path_type=Path),
    help="Which tenant may choose which edit (JSON, YAML), as for serve build.",
)
@click.option("--tls-cert", type=click.Path(path_type=Path), help="A certificate (PEM); with --tls-key.")
@click.option("--tls-key", type=click.Path(path_type=Path), help="Its key (PEM), without a password.")
@click.option(
    "--filter",
    "output_filter",
    type=click.Choice(["none", "blur", "refuse"]),
    default="none",
    show_default=True,
    help="What happens to images in which NudeNet finds nudity.",
)
@click.option("--audit-log", type=click.Path(path_type=Path), help="Append one JSON line for each image to this file.")
@click.option("--log-prompts", is_flag=True, help="Write prompts to the audit log, too.")
@click.option(
    "--drain-timeout",
    type=click.FloatRange(min=0),
    default=30.0,
    show_default=True,
    help="Seconds that images have to be finished in after SIGTERM.",
)
def run(
    onnx_dir: str,
    host: str,
    port: int,
    edit_file: Path | None,
    edit_names: tuple[str, ...],
    key_files: tuple[Path, ...],
    policy_file: Path | None,
    tls_cert: Path | None,
    tls_key: Path | None,
    drain_timeout: float,
    **options: Any,
) -> None:
    """Serve DIR, an exported folder, over HTTP until SIGTERM or Ctrl-C: no PyTorch, no other server.

    Requests that fit are denoised together, and each image is the same as alone. Speaks OpenAI's images API, KServe's
    inference protocol and Prometheus, with a page for people at /. DIR "demo" is the bundled model, with its base (a
    folder of that name is ./demo).

    A folder without an edit isn't served, nor is a bank's base, unless --with-base says so. Exit 0: everything that
    was taken was finished; 1: the drain's time was over before that; 2: it can't start.

    With --policy a client sees and chooses only the edits of its key's tenant; those of the policy's default if its
    key has none, or one that the policy doesn't list.

    \b
    Examples:
      excise serve run demo
      excise serve run sd-onnx --edit nudity.safetensors --host 0.0.0.0 --api-key-file keys.txt --filter blur
      excise serve run sd-bank --provider cuda --max-batch 16 --deadline 30 --audit-log audit.jsonl
      excise serve run sd-bank --api-key-file keys.txt --policy tenants.yaml
      curl localhost:8000/v1/images/generations -H 'content-type: application/json' -d '{"prompt": "a red apple"}'
    """
    from excise.serve.listener import address, listen

    _check_installed()
    settings = _settings(_keys(key_files), _policy(policy_file), options)
    tls = _tls(tls_cert, tls_key)
    names = _pairs(edit_names)
    folder = Path(onnx_dir)
    # Listening comes before loading the model: that takes a while, and this may fail.
    with contextlib.closing(listen(host, port)) as listener:
        if not settings.api_key_digests and not host.startswith(_LOCAL):
            say(f"warning: whoever reaches {host} can make images: give --api-key-file, or listen on 127.0.0.1")
        if onnx_dir == DEMO:
            folder, names = _demo(names)
            options |= {"with_base": True, "name": options["name"] or DEMO}
        with _opened(
            folder,
            edits=() if edit_file is None else (edit_file,),
            model=options["name"],
            names=names,
            default=options["default_edit"],
            max_waiting=options["queue"],
            **{name: options[name] for name in _ENGINE_OPTIONS},
        ) as engine:
            from excise.serve.embedded_server import EmbeddedServer
            from excise.serve.http_app import create_app
            from excise.serve.log_lines import log_to_stderr
            from excise.serve.page import page

            app = create_app(engine, settings, page=page())
            log_to_stderr()
            server = EmbeddedServer(
                app,
                engine,
                settings,
                tls=tls,
                drain_timeout=drain_timeout,
                say=say,
                ready=lambda: _announce(engine.served, address(listener, tls)),
            )
            server.run_until_signal(listener)
    if server.unfinished:
        say(f"ended; {server.unfinished} images weren't finished")
        sys.exit(1)
    say("ended; everything that was taken was finished")


def _opened(folder: Path, **options: Any) -> BatchEngine:
    """The engine, opened while the HTTP side is imported: on two cores that is half a second less to wait."""
    from excise.serve.open_engine import open_engine

    with ThreadPoolExecutor(1) as pool:
        opening = pool.submit(open_engine, folder, **options)
        with needs("serve"):
            importlib.import_module("excise.serve.embedded_server")
            importlib.import_module("excise.serve.http_app")
        return opening.result()


def _check_installed() -> None:
    """Raise ``MissingExtra`` before anything is loaded."""
    for library in ("fastapi", "uvicorn", "prometheus_client"):
        if importlib.util.find_spec(library) is None:
            raise MissingExtra(library, "serve")


def _announce(served: Served, url: str) -> None:
    default = served.edits[0]
    erased = ", ".join(served.concepts.get(default.name, ())) or default.summary
    others = ", ".join(edit.name for edit in served.edits[1:])
    say(f"{served.model} on {url} with edit {default.name} {(default.id or '')[:12]} (erases {erased})")
    if others:
        say(f"requests may choose: {others}")


def _settings(keys: dict[str, str | None], policy: EditPolicy | None, options: dict[str, Any]) -> ServerSettings:
    """The HTTP side's settings. Raises ``UsageError`` for a value that can't be used."""
    from pydantic import ValidationError

    from excise.manifest import first_problem
    from excise.serve.http_settings import ServerSettings

    steps: int = options["max_steps"]
    tenants = {digest: tenant for digest, tenant in keys.items() if tenant is not None}
    if policy is not None and (unlisted := sorted(set(tenants.values()) - set(policy.tenants))):
        names = ", ".join(policy.default) or "nothing"
        say(f"warning: --policy doesn't list tenant {unlisted[0]!r} of the API keys: it may choose {names}")
    try:
        return ServerSettings(
            api_key_digests=tuple(keys),
            api_key_tenants=tenants,
            policy=policy,
            max_steps=steps,
            default_steps=min(steps, ServerSettings.model_fields["default_steps"].default),
            **{name: options[name] for name in ("deadline", "output_filter", "audit_log", "log_prompts")},
        )
    except ValidationError as error:
        raise UsageError(f"--{first_problem(error).replace('_', '-', 1)}") from error


def _keys(files: tuple[Path, ...]) -> dict[str, str | None]:
    """The API keys of the files and of the environment, and their tenants. Raises ``UsageError``."""
    from excise.serve.http_keys import read_keys

    return read_keys(files, os.environ.get(KEYS_ENV, ""))


def _policy(file: Path | None) -> EditPolicy | None:
    if file is None:
        return None
    from excise.serve.edit_policy import load_policy

    return load_policy(file)


def _tls(certificate: Path | None, key: Path | None) -> Tls | None:
    from excise.serve.listener import Tls

    if certificate is None and key is None:
        return None
    if certificate is None or key is None:
        raise UsageError("--tls-cert and --tls-key: give both")
    tls = Tls(certificate, key)
    tls.check()
    return tls


def _pairs(given: tuple[str, ...]) -> dict[str, str]:
    pairs = dict(one.partition("=")[::2] for one in given)
    for name, identity in pairs.items():
        if not name or not identity:
            raise UsageError(f"--edit-name {name}={identity}: give NAME=ID, the beginning of an edit's id")
    return pairs


def _demo(names: dict[str, str]) -> tuple[Path, dict[str, str]]:
    """The bundled model's folder, and the names of its edits where the user gives no others."""
    from excise.demo.bundled_onnx import bundled
    from excise.manifest import read_manifest

    folder = bundled(say=say)
    ids = [entry.id for entry in read_manifest(folder).bank if entry is not None]
    named = dict(zip(DEMO_EDITS, ids, strict=False))
    return folder, names or named
