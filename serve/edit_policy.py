"""Which tenant may choose which edit.

    {"format": 1,
     "default": ["weapons"],
     "tenants": {"studio": ["weapons", "van-gogh"], "blocked": []}}

A tenant's first name is what its requests get that name no edit. ``default`` is for requests without a tenant and for
tenants that aren't listed; without it they are refused.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from excise.errors import MissingExtra, UsageError
from excise.manifest import first_problem
from excise.named_file import read_named
from excise.printable import printable

FORMAT = 1
_LIMIT = 1 << 20

Names = tuple[Annotated[str, Field(min_length=1)], ...]


class EditPolicy(BaseModel):
    """The names of edits that each tenant may choose from, its default first."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: int = FORMAT
    default: Names = ()
    tenants: dict[Annotated[str, Field(min_length=1)], Names] = {}

    @field_validator("format")
    @classmethod
    def _known(cls, value: int) -> int:
        if value != FORMAT:
            raise ValueError(f"{value} is unknown: this excise reads {FORMAT}")
        return value

    def allowed(self, tenant: str | None) -> Names:
        """The names that a tenant may choose, its default first; none where it is refused."""
        return self.tenants.get(tenant, self.default) if tenant else self.default

    def choose(self, tenant: str | None, edit: str | None) -> str:
        """The name of the edit that a request gets. An unknown edit and a forbidden one look the same to a client.

        Raises:
            UsageError: The tenant may not choose it, or nothing at all.
        """
        allowed = self.allowed(tenant)
        if not allowed:
            who = "a request without a tenant" if not tenant else "this tenant"
            raise UsageError(f"{who} may choose no edit here: ask the operator for access")
        if edit is None:
            return allowed[0]
        if edit not in allowed:
            raise UsageError(f"edit={printable(edit)!r} isn't one that this tenant may choose: {', '.join(allowed)}")
        return edit

    @property
    def names(self) -> tuple[str, ...]:
        """Every edit that the policy names, each once."""
        return tuple(dict.fromkeys(name for names in (self.default, *self.tenants.values()) for name in names))

    def check(self, names: Iterable[str], source: str) -> None:
        """Raise ``UsageError`` unless every edit that the policy names is one of ``names``."""
        held = tuple(names)
        if unknown := [name for name in self.names if name not in held]:
            raise UsageError(f"{source} names edit {unknown[0]!r}, which isn't here: these are {', '.join(held)}")

    def to_json(self) -> str:
        """The policy as JSON, with a final newline; the order of the names is kept."""
        return json.dumps(self.model_dump(mode="json"), indent=2, ensure_ascii=False) + "\n"


def load_policy(path: Path) -> EditPolicy:
    """Read a policy from JSON, or from YAML if its name ends with ``.yaml`` or ``.yml``.

    Raises:
        UsageError: It can't be read, or a field is wrong.
        MissingExtra: It is YAML, and PyYAML isn't installed.
    """
    data = read_named(path, _LIMIT, folder="name a policy file", missing=f"{printable(path)} doesn't exist")
    if len(data) > _LIMIT:
        raise UsageError(f"{printable(path)} is longer than {_LIMIT} bytes: is it a policy?")
    raw = _yaml(path, data) if path.suffix in (".yaml", ".yml") else _json(path, data)
    try:
        return EditPolicy.model_validate(raw)
    except ValidationError as error:
        raise UsageError(f"{printable(path)}: {printable(first_problem(error))}") from error


def _json(path: Path, data: bytes) -> Any:
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{printable(path)} isn't JSON: {printable(error)}") from error


def _yaml(path: Path, data: bytes) -> Any:
    try:
        import yaml
    except ModuleNotFoundError as error:
        raise MissingExtra("yaml", "serve") from error
    try:
        return yaml.safe_load(data)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UsageError(f"{printable(path)} isn't YAML: {printable(error)}") from error
