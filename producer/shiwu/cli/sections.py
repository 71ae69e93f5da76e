"""The commands of `shiwu` in sections, with those of installed extensions.

An extension registers a command as an entry point of the group `shiwu.commands.SECTION`, with the extra that it needs:

    [project.entry-points."shiwu.commands.bulk"]
    backfill = "shiwu.backfill.command:backfill [backfill]"
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from importlib.metadata import EntryPoint, entry_points
from typing import Final

import click

PREFIX: Final = "shiwu.commands."
FIRST, LAST = "Jobs", "Operations"


def installed_commands() -> dict[str, EntryPoint]:
    """The entry points of extensions by the name of their command."""
    everything = entry_points()
    groups = sorted(group for group in everything.groups if group.startswith(PREFIX))
    return {entry.name: entry for group in groups for entry in sorted(everything.select(group=group))}


class SectionedGroup(click.Group):
    """A group whose help lists commands by section. Extensions are imported when their command or the help is used.

    Attributes:
        operations: commands of its own that stand in the last section; the others stand in the first.
    """

    operations: frozenset[str] = frozenset()

    @cached_property
    def _extensions(self) -> Mapping[str, EntryPoint]:
        return installed_commands()

    def list_commands(self, ctx: click.Context) -> list[str]:
        """All names, those of extensions too."""
        return sorted({*super().list_commands(ctx), *self._extensions})

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The command of this name; one that says what to install where an extension lacks a library."""
        if (own := super().get_command(ctx, cmd_name)) is not None or cmd_name not in self._extensions:
            return own
        entry = self._extensions[cmd_name]
        try:
            loaded = entry.load()
        except ModuleNotFoundError as error:
            return _missing(entry, error)
        if not isinstance(loaded, click.Command):
            raise TypeError(f"expected a click command at {entry.value} of {entry.group}, got {type(loaded).__name__}")
        return loaded

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write one list for each section."""
        sections: dict[str, list[str]] = {FIRST: []}
        for name in self.list_commands(ctx):
            sections.setdefault(self._section(name), []).append(name)
        order = [FIRST, *sorted(sections.keys() - {FIRST, LAST}), LAST]
        width = max((len(name) for names in sections.values() for name in names), default=0)
        limit = formatter.width - 6 - width
        for section in order:
            commands = [(name.ljust(width), self.get_command(ctx, name)) for name in sections.get(section, ())]
            rows = [
                (name, command.get_short_help_str(limit))
                for name, command in commands
                if command and not command.hidden
            ]
            if rows:
                with formatter.section(section):
                    formatter.write_dl(rows)

    def _section(self, name: str) -> str:
        if name in self.commands or name not in self._extensions:
            return LAST if name in self.operations else FIRST
        return self._extensions[name].group.removeprefix(PREFIX).capitalize()


def _missing(entry: EntryPoint, error: ModuleNotFoundError) -> click.Command:
    extra = ",".join(entry.extras)
    text = f"{entry.name} needs {error.name}: run `pip install '.[{extra}]'` in a clone of shiwu"

    @click.command(
        entry.name,
        help=f"(not installed) {text}",
        short_help=f"Needs the extra `{extra}`.",
        context_settings={"ignore_unknown_options": True, "help_option_names": []},
    )
    @click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
    def command(arguments: tuple[str, ...]) -> None:
        raise click.UsageError(text)

    return command
