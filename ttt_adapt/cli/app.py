"""The `ttt-adapt` command: one file of this folder for each of its commands."""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib.metadata import EntryPoint, entry_points

from ttt_adapt.errors import TTTAdaptError, missing

try:
    import typer
    from rich.console import Console
    from rich.markup import escape
except ImportError as error:  # the core does not need them
    raise missing("typer or rich", "cli") from error

from ttt_adapt.cli.calibrate import calibrate
from ttt_adapt.cli.demo import demo
from ttt_adapt.cli.eval import evaluate
from ttt_adapt.cli.info import info
from ttt_adapt.cli.run import run
from ttt_adapt.cli.train import TrainCommand, train

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Make an existing vision model keep learning from the video it is watching.",
)
for _name, _command in (
    ("demo", demo),
    ("train", train),
    ("calibrate", calibrate),
    ("run", run),
    ("eval", evaluate),
    ("info", info),
):
    app.command(_name, cls=TrainCommand if _command is train else None)(_command)


def _hand_over(entry: EntryPoint) -> Callable[[typer.Context], None]:
    """A command that gives its arguments to an integration's own parser, which is loaded when it is called."""

    def call(context: typer.Context) -> None:
        command = typer.main.get_command(entry.load())
        status = command.main(context.args, context.command_path, standalone_mode=False)
        if status:  # Click returns it instead of leaving
            raise typer.Exit(status)

    return call


for _entry in entry_points(group="ttt_adapt.commands"):
    app.command(
        _entry.name,
        help=f"{_entry.module.split('.')[0]}: see 'ttt-adapt {_entry.name} --help'.",
        context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []},
    )(_hand_over(_entry))


def main() -> None:
    """Entry point: an expected error is one line on standard error and exit status 1; Ctrl-C is 130."""
    errors = Console(stderr=True)
    try:
        app()
    except (TTTAdaptError, OSError) as error:
        line = " ".join(str(error).split())
        errors.print(f"[bold red]error:[/] {escape(line)}", highlight=False, soft_wrap=True)
        sys.exit(1)
    except SystemExit as stop:
        if stop.code == 130:  # what Typer makes of Ctrl-C
            errors.print("interrupted")
        raise


if __name__ == "__main__":
    main()
