"""Files of API keys: one key a line, and behind it the tenant that it belongs to.

    # a comment has a line of its own
    6fd0…a1              a key that belongs to no tenant
    0c44…9e   studio     a key of the tenant "studio"; a name may hold spaces

Several keys may belong to one tenant, so that one of them can be replaced while the other still works.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from excise.errors import UsageError
from excise.printable import printable
from excise.serve.http_settings import key_digest


def read_keys(files: Sequence[Path], variable: str = "") -> dict[str, str | None]:
    """The digest of every key, and the tenant that it belongs to, None for none.

    Args:
        files: As the module says.
        variable: Keys of no tenant, with spaces or commas between them: an environment variable's value.

    Raises:
        UsageError: A file can't be read or holds no key, a key can't be used, or is given to two tenants. The message
            names the file and the line, never a key.
    """
    found: dict[str, str | None] = {}
    for key in filter(None, re.split(r"[\s,]+", variable)):
        found[key_digest(key)] = None
    for file in files:
        held = 0
        for where, key, tenant in _lines(file):
            held += 1
            try:
                digest = key_digest(key)
            except UsageError as error:
                raise UsageError(f"{where}: {error}") from error
            if found.setdefault(digest, tenant) != tenant:
                raise UsageError(f"{where}: this key is another tenant's already: give each tenant a key of its own")
        if not held:  # a server that asks for no key would be the result
            raise UsageError(f"--api-key-file {file} holds no key: write one a line")
    return found


def _lines(file: Path) -> Iterator[tuple[str, str, str | None]]:
    """Where each key is, the key, and its tenant."""
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise UsageError(f"--api-key-file {file} can't be read: {error}") from error
    for number, line in enumerate(lines, 1):
        key, *rest = line.split(None, 1)[:2] or [""]
        if not key or key.startswith("#"):
            continue
        where, tenant = f"--api-key-file {file}, line {number}", rest[0].strip() if rest else None
        if tenant is not None and (tenant.startswith("#") or printable(tenant) != tenant):
            raise UsageError(f"{where}: {printable(tenant[:40])!r} is no tenant's name: a comment has its own line")
        yield where, key, tenant
