"""Write docs/cli.md from ``--help``; a test compares the two."""

from __future__ import annotations

from pathlib import Path

import click

from excise.cli import cli

PAGE = Path(__file__).parent / "cli.md"


def page() -> str:
    """The whole reference as Markdown."""
    parts = ["# The command line\n\nWritten by `make docs` from `--help`.\n"]
    for name in (None, *cli.commands):
        command: click.Command = cli if name is None else cli.commands[name]
        title = "excise" if name is None else f"excise {name}"
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


if __name__ == "__main__":
    PAGE.write_text(page())
