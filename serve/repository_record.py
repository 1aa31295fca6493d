"""The record of a Triton repository: its versions, which one is served, and which were before.

It is a parameter of the pipeline's ``config.pbtxt``, so that what Triton loads and what excise believes change in one
rename. ``repository.json`` is a copy for people, written after it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, computed_field, model_validator

from excise.errors import ArtefactError
from excise.manifest import Sha256, first_problem
from excise.onnx_metadata import EDIT_ID
from excise.serve.pbtxt import Message, parse
from excise.serve.triton_options import NETWORKS, Backend

COPY, CONFIG = "repository.json", "config.pbtxt"

#: Parameters of the pipeline's configuration: of the version that is served, and the record.
EDITS, MANIFEST, CANARY = "excise.edits", "excise.manifest_sha256", "excise.canary"
RECORD = "excise.repository"

Version = Annotated[int, Field(ge=1)]


class VersionEntry(BaseModel):
    """One version.

    Attributes:
        edit: Id of the edit that its weights carry; None for a bank and the unedited model.
        edits: Ids of the edits that requests may name, by name, the default first; the base has None.
        summary: The edit on one line.
        manifest: SHA-256 of the version folder's ``excise.json``.
        canary: Whether it has a canary, which its load then has to pass.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    edit: str | None
    edits: dict[str, str | None]
    summary: str
    manifest: Sha256
    canary: bool


class Record(BaseModel):
    """What a repository holds.

    Attributes:
        format: Version of this format.
        model: Name of the pipeline's model.
        backend: What runs its networks.
        with_base: Whether the unedited model may be served.
        current: The version that is served.
        before: Versions that were, the last one latest; a rollback goes there.
        versions: By number.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal[1] = 1
    model: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    backend: Backend
    with_base: bool = False
    current: Version
    before: tuple[Version, ...] = ()
    versions: dict[Version, VersionEntry]

    @model_validator(mode="before")
    @classmethod
    def _without_previous(cls, value: Any) -> Any:
        return {key: one for key, one in value.items() if key != "previous"} if isinstance(value, dict) else value

    @model_validator(mode="after")
    def _all_there(self) -> Record:
        if missing := [number for number in (self.current, *self.before) if number not in self.versions]:
            raise ValueError(f"version {missing[0]} is served and not among the versions")
        return self

    @computed_field  # type: ignore[prop-decorator]
    @property
    def previous(self) -> int | None:
        """Where a rollback goes."""
        return self.before[-1] if self.before else None

    @property
    def networks(self) -> tuple[str, ...]:
        """The models beside the pipeline's."""
        return () if self.backend == "python" else NETWORKS

    @property
    def kept_loaded(self) -> tuple[int, ...]:
        """The present version and the previous one."""
        return tuple(sorted({self.current, self.previous or self.current}))

    def kept_loaded_with(self, old: Record) -> tuple[int, ...]:
        """The versions of the networks that are loaded while this record takes the place of ``old``, and after."""
        return tuple(sorted({self.current, old.current}))

    def promoted(self, number: int, entry: VersionEntry) -> Record:
        """The record with one more version, which is served."""
        return self._with(
            current=number, before=(*self.before, self.current), versions={**self.versions, number: entry}
        )

    def rolled_back(self, number: int) -> Record:
        """The record with ``number`` served again: what came after it is no longer a way back."""
        before = self.before
        before = before[: before.index(number)] if number in before else (*before, self.current)
        return self._with(current=number, before=before)

    def trimmed(self, keep: int) -> Record:
        """The record with its ``keep`` newest versions, and whatever is served or was just before."""
        kept = {*sorted(self.versions)[-keep:], *self.kept_loaded}
        versions = {number: entry for number, entry in self.versions.items() if number in kept}
        return self._with(before=tuple(one for one in self.before if one in kept), versions=versions)

    def _with(self, **changes: object) -> Record:
        return Record.model_validate({**dict(self), **changes})

    def to_json(self, *, indent: int | None = 2) -> str:
        """The record as deterministic JSON; edits stay in their order."""
        return json.dumps(self.model_dump(mode="json"), indent=indent, ensure_ascii=False)

    def written_into(self, config: Message) -> Message:
        """The pipeline's configuration with this record, its edit, and its current version alone to be loaded."""
        entry = self.versions[self.current]
        parameters = {
            EDIT_ID: entry.edit,
            EDITS: json.dumps(entry.edits, ensure_ascii=False),
            MANIFEST: entry.manifest,
            CANARY: "required" if entry.canary else "off",
            RECORD: self.to_json(indent=None),
        }
        others = [one for one in config.messages("parameters") if one.text("key") not in parameters]
        own = [
            Message((("key", key), ("value", Message((("string_value", value),)))))
            for key, value in parameters.items()
            if value is not None
        ]
        return served(config.replaced("parameters", [*others, *own]), (self.current,))


def served(config: Message, versions: tuple[int, ...]) -> Message:
    """A configuration that has exactly these versions loaded."""
    specific = Message(tuple(("versions", number) for number in versions))
    return config.replaced("version_policy", [Message((("specific", specific),))])


def served_versions(config: Message) -> tuple[int, ...] | None:
    """The versions that a configuration has loaded; None where it doesn't name them."""
    for policy in config.messages("version_policy"):
        for specific in policy.messages("specific"):
            return tuple(one for one in specific.all("versions") if isinstance(one, int))
    return None


def parameter(config: Message, key: str) -> str | None:
    """A parameter of a configuration."""
    for one in config.messages("parameters"):
        if one.text("key") == key:
            return next((value.text("string_value") for value in one.messages("value")), None)
    return None


def read_config_text(repository: Path, model: str) -> Message:
    """A model's ``config.pbtxt``.

    Raises:
        ArtefactError: It isn't there, or isn't one.
    """
    path = repository / model / CONFIG
    try:
        return parse(path.read_text(encoding="utf-8"), str(path))
    except OSError as error:
        raise ArtefactError(f"{path} can't be read ({error.strerror}): build the repository again") from error
    except UnicodeDecodeError as error:
        raise ArtefactError(f"{path} isn't UTF-8: build the repository again") from error


def is_repository(folder: Path) -> bool:
    """Whether a folder is a Triton repository that excise built."""
    return (folder / COPY).is_file()


def read_copy(repository: Path) -> Record:
    """``repository.json``, which may be one step behind ``read_record`` for a moment.

    Raises:
        ArtefactError: It isn't there, or is malformed.
    """
    path = repository / COPY
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise ArtefactError(f"{repository} is no repository of excise: build one with excise serve build") from error
    except (OSError, UnicodeDecodeError) as error:
        raise ArtefactError(f"{path} can't be read ({error}): build the repository again") from error
    return _parsed(text, str(path))


def read_record(repository: Path) -> Record:
    """The record in the pipeline's configuration: the state of the repository.

    Raises:
        ArtefactError: This is no repository of excise, or its configuration is damaged.
    """
    copy = read_copy(repository)
    text = parameter(read_config_text(repository, copy.model), RECORD)
    path = repository / copy.model / CONFIG
    if text is None:
        raise ArtefactError(f"{path} has no parameter {RECORD}: build the repository again")
    return _parsed(text, f"{path}, {RECORD}")


def _parsed(text: str, source: str) -> Record:
    try:
        return Record.model_validate(json.loads(text))
    except ValidationError as error:
        raise ArtefactError(f"{source} is malformed: {first_problem(error)}; build the repository again") from error
    except (ValueError, RecursionError) as error:
        raise ArtefactError(f"{source} isn't JSON ({error}): build the repository again") from error
