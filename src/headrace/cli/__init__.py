"""The command `headrace`: a verb a file, loaded when it is called."""

import sys
from importlib import import_module

import click

from headrace import __version__

_VERBS = {
    "agents": "headrace.cli.agents",
    "bench": "headrace.cli.bench",
    "doctor": "headrace.cli.doctor",
    "indexes": "headrace.cli.indexes",
    "keys": "headrace.cli.keys",
    "shards": "headrace.cli.shards",
    "up": "headrace.cli.up",
}


class _Verbs(click.Group):
    """Finds a verb in its file, so that `headrace --help` loads no driver."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted(_VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        module = _VERBS.get(cmd_name)
        if module is None:
            return None
        command: click.Command = getattr(import_module(module), cmd_name)
        return command

    def invoke(self, ctx: click.Context) -> object:
        from headrace.errors import HeadraceError

        try:
            return super().invoke(ctx)
        except HeadraceError as error:
            from headrace.cli.display import visible  # an error may quote an agent

            click.secho(f"headrace: {visible(error.message)}", fg="red", err=True)
            click.echo(f"Fix: {error.fix}", err=True)
            sys.exit(1)


@click.group(cls=_Verbs, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="headrace")
def main() -> None:
    """The performance layer for Python back ends."""
