"""A Triton model repository: built from an export, given new versions, and set back to old ones.

    REPO/excise/config.pbtxt    what Triton loads, and the record of all versions
    REPO/excise/N/…             see ``version_folder``
    REPO/excise/warmup/         the inputs of the warm-up request
    REPO/text_encoder/N/model.onnx, REPO/unet/…, REPO/vae_decoder/…    with the backends onnxruntime and tensorrt
    REPO/repository.json        a copy of the record

A promotion and a rollback take effect in the rename of ``REPO/excise/config.pbtxt``: killed at any moment, the
repository serves the old version or the new one. What a killed one left behind, the next one removes.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path

from excise.errors import ArtefactError, UsageError
from excise.manifest import NAME, hash_file, read_manifest, verify
from excise.output import check_free, new_folder
from excise.serve.config_fit import network_fit, pipeline_fit
from excise.serve.edit_names import edit_names
from excise.serve.edit_policy import EditPolicy, load_policy
from excise.serve.pbtxt import write
from excise.serve.repository_change import locked, staging, switch, tidy, write_record
from excise.serve.repository_record import CONFIG, COPY, Record, read_config_text
from excise.serve.triton_control import TritonServer
from excise.serve.triton_models import image_shape, network_config, pipeline_config, warmup_files
from excise.serve.triton_options import TritonOptions
from excise.serve.version_folder import (
    ONNX,
    POLICY,
    Recorder,
    check_export,
    finish_version,
    free_number,
    network_signature,
    take_export,
    write_network,
)

Say = Callable[[str], None]

#: A finished export, or what makes one at a new place out of the present version's.
Source = Path | Callable[[Path, Path], object]


def build(
    folder: Path,
    out: Path,
    options: TritonOptions | None = None,
    *,
    with_base: bool = False,
    policy: EditPolicy | None = None,
    names: Mapping[str, str] | None = None,
    link: bool = True,
    canary: Recorder | None = None,
    progress: Say | None = None,
) -> Record:
    """Write the repository ``out`` with one version, made of an exported pipeline.

    Args:
        folder: What ``excise export``, ``excise patch``, ``excise bank`` or ``excise engines`` wrote.
        out: A new folder.
        options: How it is to run.
        with_base: Whether the unedited model may be served, alone or in a bank.
        policy: Which tenant may choose which edit; by default everyone may choose each.
        names: Names of edits in place of the usual ones, each with the beginning of an id.
        link: Share the files by hard links.
        canary: Records what the model makes of a few fixed requests.
        progress: Told each step, one line at a time.

    Raises:
        UsageError: The unedited model would be served without ``with_base``, a name or the policy doesn't fit, or the
            model is none that a repository serves.
        ArtefactError: ``folder`` is incomplete or altered, lacks an engine that the backend needs, or has a network
            with a scalar input, which Triton doesn't take (``excise engines --for-triton``).
        OutputError: ``out`` holds something, or can't be written.
    """
    say, options = progress or _silent, options or TritonOptions()
    check_free(out)
    manifest = read_manifest(folder)
    check_export(folder, manifest, with_base=with_base)
    edits = edit_names(manifest, names)
    if policy is not None:
        policy.check(edits, "the policy")
    shape = image_shape(folder)
    networks = {
        name: network_config(name, options, network_signature(folder, name, options.backend))
        for name in options.networks
    }
    _check_files(folder, say)
    with new_folder(out) as partial:
        model = partial / options.name
        version = model / "1"
        version.mkdir(parents=True)
        take_export(folder, version / ONNX, link=link)
        if canary is not None:
            say("recording the canary")
        entry = finish_version(version, edits, policy=policy, canary=canary)
        record = Record(
            model=options.name, backend=options.backend, with_base=with_base, current=1, versions={1: entry}
        )
        # A warm-up request has no tenant: where such requests are refused, so would the model's load be.
        warmup = options.warmup and (policy is None or bool(policy.default))
        config = pipeline_config(options, shape, warmup=warmup)
        if config.model_warmup:
            (model / "warmup").mkdir()
            for name, data in warmup_files(options).items():
                (model / "warmup" / name).write_bytes(data)
        (model / CONFIG).write_text(write(record.written_into(config.message())), encoding="utf-8")
        for name, network in networks.items():
            write_network(version / ONNX, name, options.backend, partial / name / "1")
            (partial / name / CONFIG).write_text(network.to_text(), encoding="utf-8")
        (partial / COPY).write_text(record.to_json() + "\n", encoding="utf-8")
    return record


def promote(
    repository: Path,
    source: Source,
    *,
    policy: EditPolicy | None = None,
    names: Mapping[str, str] | None = None,
    keep: int | None = None,
    canary: Recorder | None = None,
    server: TritonServer | None = None,
    progress: Say | None = None,
) -> Record:
    """Add a version to a repository and serve it. Files that it shares with the present one are hard links.

    What a person changed in a ``config.pbtxt`` stays, but for the versions and excise's own parameters.

    Args:
        repository: What ``build`` wrote.
        source: The new version's export, or what writes it, given the present one's and a new folder.
        policy: In place of the present version's, which stays otherwise.
        names: As for ``build``.
        keep: Remove all but so many of the newest versions; the present and the previous one always stay.
        canary: As for ``build``.
        server: Triton running on this repository with explicit model control, to load the new version. With networks
            of their own it is also asked for an image: their canary can't refuse the load.
        progress: Told each step, one line at a time.

    Raises:
        UsageError: As ``build``, or the new version is what is served already.
        ArtefactError: The repository or the export is damaged, their inputs and outputs differ, or the server refused
            the version: then the old one is still served, and nothing of the new one is left.
        OutputError: The repository can't be written, or another promotion is under way.
        EditError, NumericsError: From what writes the export.
    """
    say = progress or _silent
    if keep is not None and keep < 1:
        raise UsageError(f"keep={keep}: give an integer from 1")
    with locked(repository) as record:
        model = repository / record.model
        number = free_number(model, max(record.versions))
        tidy(repository, record)
        present = model / str(record.current)
        with staging(model) as staged:
            if isinstance(source, Path):
                _check_files(source, say)
                take_export(source, staged / ONNX, link=True, like=present / ONNX)
            else:
                source(present / ONNX, staged / ONNX)
            manifest = read_manifest(staged / ONNX)
            check_export(staged / ONNX, manifest, with_base=record.with_base)
            if hash_file(staged / ONNX / NAME) == hash_file(present / ONNX / NAME):
                raise UsageError(f"{repository} serves that already, as version {record.current}: nothing to promote")
            edits = edit_names(manifest, names)
            if policy is None and (present / POLICY).is_file():
                policy = load_policy(present / POLICY)
            if policy is not None:
                policy.check(edits, "the policy (give another with --policy)")
            _check_fit(repository, record, staged / ONNX)
            if canary is not None:
                say("recording the canary")
            entry = finish_version(staged, edits, policy=policy, canary=canary)
            for name in record.networks:
                with staging(repository / name) as network:
                    write_network(staged / ONNX, name, record.backend, network / "version")
                    os.rename(network / "version", repository / name / str(number))
            os.rename(staged, model / str(number))
        new = record.promoted(number, entry)
        say(f"switching from version {record.current} to {number}")
        reason = switch(repository, record, new, server, say)
        if reason is None and keep is not None:
            new = new.trimmed(keep)
            write_record(repository, new)
        tidy(repository, new if reason is None else record)
        if reason is not None:
            raise ArtefactError(
                f"Triton refused version {number}: {reason}; version {record.current} is still the one served"
            )
    return new


def rollback(
    repository: Path, *, to: int | None = None, server: TritonServer | None = None, progress: Say | None = None
) -> Record:
    """Serve the previous version again, or version ``to``. No version is removed.

    Raises:
        UsageError: There is no previous version, or no version ``to``.
        ArtefactError: That version is incomplete, or the server refused it: then nothing has changed.
        OutputError: The repository can't be written, or a promotion is under way.
    """
    say = progress or _silent
    with locked(repository) as record:
        number = record.previous if to is None else to
        held = ", ".join(str(one) for one in sorted(record.versions))
        if number is None:
            raise UsageError(f"{repository} has served no version before {record.current}: name one with --to ({held})")
        if number not in record.versions:
            raise UsageError(f"{repository} has no version {number}: these are {held}")
        if number == record.current:
            raise UsageError(f"{repository} serves version {number} already")
        folder = repository / record.model / str(number)
        if not (folder / NAME).is_file() or hash_file(folder / NAME) != record.versions[number].manifest:
            raise ArtefactError(f"{folder} is missing or was altered: name another version with --to ({held})")
        for path, entry in read_manifest(folder).files.items():
            if not (folder / path).is_file() or (folder / path).stat().st_size != entry.size:
                raise ArtefactError(f"{folder / path} is missing or was altered: name another version with --to")
        new = record.rolled_back(number)
        say(f"switching from version {record.current} to {number}")
        if (reason := switch(repository, record, new, server, say)) is not None:
            raise ArtefactError(
                f"Triton refused version {number}: {reason}; version {record.current} is still the one served"
            )
        tidy(repository, new)
    return new


def _check_files(folder: Path, say: Say) -> None:
    """Raise ``ArtefactError`` unless every file that an export's manifest names is as it says."""
    say(f"checking {folder}")
    if problems := [line for line in verify(folder) if not line.endswith("is not in the manifest")]:
        raise ArtefactError(f"{folder}: {problems[0]}; export again")


def _check_fit(repository: Path, record: Record, onnx: Path) -> None:
    """Raise ``ArtefactError`` unless an export takes and gives what the repository's configurations say."""
    config = read_config_text(repository, record.model)
    problems = pipeline_fit(config, image_shape(onnx), f"{record.model}/{CONFIG}")
    for name in record.networks:
        signature = network_signature(onnx, name, record.backend)
        problems += network_fit(read_config_text(repository, name), signature, f"{name}/{CONFIG}")
    if problems:
        raise ArtefactError(f"{problems[0]}: a version can't be changed so; build another repository")


def _silent(message: str) -> None:
    pass
