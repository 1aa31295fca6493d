"""A Triton repository's record as lines for people."""

from __future__ import annotations

from collections.abc import Mapping

from excise.serve.repository_record import Record


def record_lines(record: Record, states: Mapping[str, str] | None = None) -> list[str]:
    """One line for the repository and some for each version, newest first; ``states`` is what a server says of them."""
    lines = [f"  model     {record.model}, backend {record.backend}" + (", base allowed" if record.with_base else "")]
    for number, entry in sorted(record.versions.items(), reverse=True):
        role = {record.current: "current", record.previous: "previous"}.get(number, "")
        lines.append(
            f"  version   {number:<4} {role:<9} {(entry.edit or 'no edit in the weights')[:12]}  {entry.summary}"
        )
        chosen = [f"{name}={edit[:12] if edit else 'base'}" for name, edit in entry.edits.items()]
        lines.append(f"            requests may name {', '.join(chosen)}")
        if states is not None:
            lines.append(f"            the server says {states.get(str(number), 'nothing of it')}")
    return lines
