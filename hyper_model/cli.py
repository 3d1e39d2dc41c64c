"""The `hyper` command: discovery of sub-commands, and errors as one line and an exit code.

A package adds a sub-command with an entry point of the group "hyper.commands". For a sub-command of `hyper NAME`, the
group is "hyper.NAME.commands". Hence hyper_model imports neither server nor training. A sub-command's module is
imported when the command runs, or for its line in `--help`. Such modules keep heavy imports inside functions.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.metadata import EntryPoint, entry_points

import click

from hyper_model.errors import AudioError, CheckpointError, HyperError

ENTRY_POINT_GROUP = "hyper.commands"
# Codes of sysexits.h, so that a process supervisor can tell permanent faults from temporary ones.
EXIT_CODES: tuple[tuple[type[HyperError], int], ...] = ((CheckpointError, 78), (AudioError, 65), (HyperError, 2))


class CommandGroup(click.Group):
    """Click group with additional sub-commands from an entry point group."""

    entry_point_group = ENTRY_POINT_GROUP

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names of all sub-commands."""
        return sorted({*super().list_commands(ctx), *self._find_commands()})

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Load one sub-command."""
        entry_point = self._find_commands().get(cmd_name)
        return super().get_command(ctx, cmd_name) if entry_point is None else _load(entry_point)

    def _find_commands(self) -> dict[str, EntryPoint]:
        return {entry_point.name: entry_point for entry_point in entry_points(group=self.entry_point_group)}


def _load(entry_point: EntryPoint) -> click.Command:
    try:
        command = entry_point.load()
    except ModuleNotFoundError as error:
        # `hyper --help` must work in a partial installation. The command itself reports the missing package.
        return _unavailable(entry_point.name, error.name or str(error))
    if not isinstance(command, click.Command):
        raise TypeError(f"the entry point {entry_point.name} is {type(command).__name__}, not a click command")
    return command


def _unavailable(name: str, module: str) -> click.Command:
    @click.command(
        name,
        short_help=f"(not available: {module} is not installed)",
        add_help_option=False,
        context_settings={"ignore_unknown_options": True, "allow_extra_args": True},
    )
    def refuse() -> None:
        raise HyperError(f"`hyper {name}` needs the Python package {module}, which is not installed")

    return refuse


@click.group(cls=CommandGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="hyper-audio")
def hyper() -> None:
    """Answer questions about audio clips: serve, train and evaluate HyPeR checkpoints."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit the process with 0 or the error's exit code."""
    try:
        hyper.main(args=arguments, prog_name="hyper")
    except HyperError as error:
        click.echo(f"hyper: {error}", err=True)
        sys.exit(next(code for kind, code in EXIT_CODES if isinstance(error, kind)))


if __name__ == "__main__":
    main()
