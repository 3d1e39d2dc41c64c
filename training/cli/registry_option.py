"""A command-line option with the names of a registry as its choices."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import groupby
from typing import Any, Protocol

import click


class Described(Protocol):
    """An entry of a registry."""

    @property
    def description(self) -> str:
        """What `--help` prints about it."""
        ...


class RegistryOption(click.Option):
    """An option with choices and help from a registry.

    The registry is imported on first use: `hyper --help` imports no models.

    Args:
        registry: Import and return the registry.
    """

    def __init__(
        self, param_decls: Sequence[str], *, registry: Callable[[], Mapping[str, Described]], help: str, **options: Any
    ) -> None:
        super().__init__(param_decls, help=help, **options)
        self.registry, self.introduction = registry, help

    def make_metavar(self, ctx: click.Context) -> str:
        """Return the choices."""
        return click.Choice(list(self.registry())).get_metavar(self, ctx) or ""

    def type_cast_value(self, ctx: click.Context, value: Any) -> Any:
        """Refuse a name outside the registry."""
        return None if value is None else click.Choice(list(self.registry())).convert(value, self, ctx)

    def get_help_record(self, ctx: click.Context) -> tuple[str, str] | None:
        """Return the help with the description of every name, neighbours of one description together."""
        entries = self.registry()
        groups = groupby(entries, lambda name: entries[name].description)
        described = " ".join(f"{', '.join(names)}: {description}." for description, names in groups)
        self.help = f"{self.introduction.format(described=described)}"
        return super().get_help_record(ctx)
