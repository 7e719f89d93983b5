"""The `ttt-adapt` command: one file of this folder for each of its commands."""

from __future__ import annotations

import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import EntryPoint, entry_points, version
from types import TracebackType
from typing import Annotated

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
from ttt_adapt.cli.language import Command, Group, typed_words
from ttt_adapt.cli.run import run
from ttt_adapt.cli.serve import serve
from ttt_adapt.cli.train import TrainCommand, train
from ttt_adapt.video.address import redacted

app = typer.Typer(
    cls=Group,
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
    ("serve", serve),
    ("eval", evaluate),
    ("info", info),
):
    app.command(_name, cls=TrainCommand if _command is train else Command)(_command)


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"ttt-adapt {version('ttt-adapt')}")
        raise typer.Exit


@app.callback()
def _options(
    show_version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_show_version, help="Show the version.")
    ] = False,
) -> None:
    """Options that stand before a command."""


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


@contextmanager
def _stop_as_ctrl_c() -> Iterator[list[int]]:
    """SIGTERM and SIGHUP end what runs inside the block as Ctrl-C does. Yields a list that gets the signal that came.

    A signal that is ignored, as SIGHUP under `nohup`, stays ignored.
    """
    came: list[int] = []

    def stop(number: int, _frame: object) -> None:
        came.append(number)
        raise KeyboardInterrupt

    names = ("SIGTERM", "SIGHUP") if threading.current_thread() is threading.main_thread() else ()
    numbers = [getattr(signal, name) for name in names if hasattr(signal, name)]  # Windows has no SIGHUP
    handled = [number for number in numbers if signal.getsignal(number) is signal.SIG_DFL]
    for number in handled:
        signal.signal(number, stop)
    try:
        yield came
    finally:
        for number in handled:
            signal.signal(number, signal.SIG_DFL)


def _traceback_without_secrets(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Print the traceback of an error that nobody expected, without the secrets of addresses."""
    lines = "".join(traceback.format_exception(kind, error, trace)).split("\n")
    sys.stderr.write("\n".join(redacted(line, typed_words()) for line in lines))


def main() -> None:
    """Entry point: an expected error is one line on standard error and exit status 1.

    Ctrl-C has the status 130, SIGTERM 143 and SIGHUP 129, as shells count them; what was kept is told before.
    """
    errors = Console(stderr=True, emoji=False)
    with _stop_as_ctrl_c() as came:
        try:
            app()
        except (TTTAdaptError, OSError) as error:
            line = redacted(" ".join(redacted(str(error), typed_words()).split()))
            errors.print(f"[bold red]error:[/] {escape(line)}", highlight=False, soft_wrap=True)
            sys.exit(1)
        except (MemoryError, RuntimeError) as error:
            if not (isinstance(error, MemoryError) or "allocate memory" in str(error) or "out of memory" in str(error)):
                sys.excepthook = _traceback_without_secrets
                raise
            errors.print(
                "[bold red]error:[/] out of memory: make the frames smaller (--size), or take another --device"
            )
            sys.exit(1)
        except SystemExit as stop:
            if stop.code != 130:  # what Typer makes of Ctrl-C
                raise
            errors.print(f"stopped by {signal.Signals(came[0]).name}" if came else "interrupted")
            sys.exit(128 + came[0] if came else 130)
        except Exception:
            sys.excepthook = _traceback_without_secrets
            raise


if __name__ == "__main__":
    main()
