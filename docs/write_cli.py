"""Write docs/cli.md from ``--help``; a test compares the two."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import click

from excise.cli import cli

PAGE = Path(__file__).parent / "cli.md"


def page() -> str:
    """The whole reference as Markdown."""
    parts = ["# The command line\n\nWritten by `make docs` from `--help`.\n"]
    for title, command in _commands("excise", cli):
        context = click.Context(
            command, info_name=title, terminal_width=100, help_option_names=cli.context_settings["help_option_names"]
        )
        text = "\n".join(line.rstrip() for line in command.get_help(context).splitlines())
        parts.append(f"## {title}\n\n```text\n{text}\n```\n")
    parts.append(
        "## Exit status\n\n| status | meaning |\n|---|---|\n"
        "| 0 | done; for `demo` and `inspect`: every check passed |\n"
        "| 1 | a check failed |\n| 2 | something that you can put right, said on one line |\n| 130 | Ctrl-C |\n"
    )
    return "\n".join(parts)


def _commands(title: str, command: click.Command) -> Iterator[tuple[str, click.Command]]:
    """A command and all below it, by their whole names."""
    yield title, command
    if isinstance(command, click.Group):
        context = click.Context(command)
        for name in command.list_commands(context) if command is not cli else command.commands:
            if (inner := command.get_command(context, name)) is not None:
                yield from _commands(f"{title} {name}", inner)


if __name__ == "__main__":
    PAGE.write_text(page())
