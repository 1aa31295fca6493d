"""What a Triton model's ``config.pbtxt`` tells ``excise.serve.triton_model``.

Its parameters are all strings, and most may be left out:

    excise.edit_id            the edit that the version has to carry; empty or absent: none, or a bank
    excise.manifest_sha256    SHA-256 of the version's excise.json; absent: not compared
    excise.edits              JSON, name → id (null: the base) of the edits that EDIT may name; the first is the default
    excise.repository         JSON, the record of all versions: what it says of this one takes the place of the above
    excise.backend            python (default): everything in this process; bls: the networks are other Triton models
    excise.provider           cpu (default), cuda, tensorrt: of ONNX Runtime
    excise.threads            CPU threads of one operator; absent: all
    excise.default_steps      50            excise.default_guidance_scale   7.5
    excise.max_steps          100           excise.max_prompt_characters    4000
    excise.stream_every       0: no previews; N: one after every N steps, of a decoupled model
    excise.stream_output      images (default) or latents: what a preview is
    excise.canary             required (default), or off, as it is of versions that were built without one
    excise.canary_detector    none (default) or nudenet: looks at the canary's images of what was erased
    excise.canary_interval    seconds between two runs of the canary, 3600; 0: only at load
    excise.canary_on_failure  refuse (default): answer UNAVAILABLE from then on; report: only the metrics tell

A parameter that can't be used keeps the model from being loaded.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal, Self

from excise.errors import ArtefactError

PREFIX = "excise."

#: Parameters that take one of some words.
CHOICES: Mapping[str, tuple[str, ...]] = {
    "backend": ("python", "bls"),
    "provider": ("cpu", "cuda", "tensorrt"),
    "stream_output": ("images", "latents"),
    "canary": ("required", "off"),
    "canary_detector": ("none", "nudenet"),
    "canary_on_failure": ("refuse", "report"),
}


@dataclass(frozen=True)
class Settings:
    """The parameters, read and checked; the module's docstring says what each is."""

    edit_id: str | None = None
    manifest_sha256: str | None = None
    edits: Mapping[str, str | None] = field(default_factory=dict)
    backend: str = "python"
    provider: str = "cpu"
    threads: int | None = None
    default_steps: int = 50
    default_guidance_scale: float = 7.5
    max_steps: int = 100
    max_prompt_characters: int = 4000
    stream_every: int = 0
    stream_output: str = "images"
    canary: str = "required"
    canary_detector: str = "none"
    canary_interval: float = 3600.0
    canary_on_failure: str = "refuse"
    networks: Literal["onnxruntime", "tensorrt"] = "onnxruntime"  #: of bls: what the record says that runs them
    unknown: tuple[str, ...] = ()  #: parameters under ``excise.`` that nothing reads

    @classmethod
    def read(cls, config: Mapping[str, Any], version: str) -> Self:
        """The settings of a version, from the model's configuration as Triton hands it over.

        Raises:
            ArtefactError: a parameter that can't be used; it is named.
        """
        given = {
            name.removeprefix(PREFIX): str(entry.get("string_value", ""))
            for name, entry in (config.get("parameters") or {}).items()
            if name.startswith(PREFIX)
        }
        known = {one.name for one in fields(cls)} - {"unknown", "networks"}
        values = {name: _parsed(name, text) for name, text in given.items() if name in known and text}
        return cls(
            **(values | _recorded(given.get("repository", ""), version)),
            unknown=tuple(sorted(set(given) - known - {"repository"})),
        )


#: Settings that the record has of each version, and what it calls them.
_OF_RECORD = {"edit_id": "edit", "edits": "edits", "manifest_sha256": "manifest"}


def _recorded(text: str, version: str) -> dict[str, Any]:
    """What the repository's record says of one version; nothing where there is no record of it."""
    try:
        record = json.loads(text) if text else {}
        entry = record["versions"][version]
        networks = {"networks": "tensorrt"} if record["backend"] == "tensorrt" else {}
        canary = {"canary": "off"} if entry.get("canary") is False else {}
        return networks | canary | {name: entry[called] for name, called in _OF_RECORD.items()}
    except (ValueError, KeyError, TypeError):
        return {}


def _parsed(name: str, text: str) -> Any:
    """The value of one parameter. Raises ``ArtefactError`` where it isn't one."""
    kind = next(str(one.type) for one in fields(Settings) if one.name == name)
    try:
        if name in CHOICES:
            if text not in CHOICES[name]:
                raise ValueError(f"choose one of {', '.join(CHOICES[name])}")
            return text
        if kind.startswith("Mapping"):
            value = json.loads(text)
            if not isinstance(value, dict):
                raise ValueError("give a JSON object")
            return value
        if kind.startswith("int"):
            least = {"stream_every": 0}.get(name, 1)
            if int(text) < least:
                raise ValueError(f"give an integer from {least}")
            return int(text)
        if kind == "float":
            if not 0 <= float(text) < float("inf"):
                raise ValueError("give a finite number that isn't negative")
            return float(text)
    except (ValueError, TypeError) as error:
        raise ArtefactError(f"the parameter {PREFIX}{name} is {text[:80]!r}: {error}") from error
    return text
