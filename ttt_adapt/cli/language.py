"""Messages in the language of the command line: arguments of the library's functions become options.

The library names its arguments as Python does. Three forms of a name are understood, and messages keep to them:

| in the library | on the command line |
|---|---|
| `size` in backticks, size= or overwrite=True | --size, --overwrite |
| "size is ..." (are, has, names) at the beginning of a statement | "--size is ..." |
| "leave size out" | "leave --size out" |

Words that are no option of the command stay as they are.
"""

from __future__ import annotations

import re
import sys
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import typer
import typer.core

from ttt_adapt.errors import TTTAdaptError
from ttt_adapt.video.address import redacted
from ttt_adapt.view.terminal import notice, rewording

ELSEWHERE = {
    "binary": "--classes background,foreground",
    "encoder_options": "--encoder-option",
    "task_options": "--task-option",
    "changes": "--set",
}
"""What the library calls otherwise than the command line."""


def typed_words() -> list[str]:
    """The arguments of this process, and the values of those of the form `--option=value`."""
    return [word for typed in sys.argv[1:] for word in (typed, typed.partition("=")[2])]


@contextmanager
def _without_secrets() -> Iterator[None]:
    """What the parser says of wrong arguments does not show the secrets of an address among them."""
    try:
        yield
    except Exception as error:
        if isinstance(message := getattr(error, "message", None), str):
            error.message = redacted(message, typed_words())  # type: ignore[attr-defined]
        raise


class Group(typer.core.TyperGroup):
    """The commands; a wrong name of one is told without secrets."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """The command that is called."""
        with _without_secrets():
            return super().resolve_command(ctx, args)


class Command(typer.core.TyperCommand):
    """A command whose errors and notices name its options."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Read the arguments."""
        try:
            with _without_secrets():
                return super().parse_args(ctx, args)
        except Exception as error:
            if re.fullmatch(r"-\d", getattr(error, "option_name", "")):
                error.message += ". Cameras are numbers from 0"  # type: ignore[attr-defined]
            raise

    def invoke(self, ctx: Any) -> Any:
        """Run the command.

        Raises:
            TTTAdaptError: as the library raised it, with the options' names in its message.
        """
        options = options_of(self.params)
        with rewording(lambda text: in_options(text, options)), _plain_warnings():
            try:
                return super().invoke(ctx)
            except TTTAdaptError as error:
                text = with_option(in_options(str(error), options), _typed(ctx))
                if text == str(error):
                    raise
                raise type(error)(text) from error


@contextmanager
def _plain_warnings() -> Iterator[None]:
    """Warnings to the user are lines of text, without the place in the source code that other warnings have."""
    with warnings.catch_warnings():
        shown = warnings.showwarning

        def show(message: Any, category: Any, *place: Any, **more: Any) -> None:
            if category is UserWarning:
                notice(f"warning: {message}")
            else:
                shown(message, category, *place, **more)

        warnings.showwarning = show
        yield


def _typed(ctx: Any) -> dict[str, list[str]]:
    """Option -> its values as the user typed them; options that were left out are not in it."""
    found = {}
    for parameter in ctx.command.params:
        name = next((name for name in parameter.opts if name.startswith("--")), None)
        source = ctx.get_parameter_source(parameter.name)
        if name is not None and source is not None and source.name == "COMMANDLINE":
            value = ctx.params.get(parameter.name)
            found[name] = [str(each) for each in (value if isinstance(value, list | tuple) else [value])]
    return found


def with_option(text: str, typed: dict[str, list[str]]) -> str:
    """A message about a value that was typed, with the option in front of it: "--arm: there is no arm 'fixd'".

    Args:
        text: the message; one that names an option already stays as it is.
        typed: option -> values as they were typed. Of `NAME=VALUE`, the message may be about either.
    """
    if re.search(r"(?<![\w-])--[a-z]", re.sub("`[^`]*`", "", text)):  # a command that helps may have options
        return text
    places = []
    for option, values in typed.items():
        for value in values:
            name, equals, _ = value.partition("=")
            if equals:
                found = re.search(rf"^{re.escape(name)} (?=is|are|has)|'{re.escape(name)}'", text)
            else:
                parts = {value, *(part.strip() for part in value.split(","))} - {""}
                either = "|".join(map(re.escape, sorted(parts, key=len, reverse=True)))
                found = (
                    re.search(rf"'(?:{either})'|(?<![\w./'-])(?:{re.escape(value)})(?![\w/'-])", text)
                    if parts
                    else None
                )
                if found and not found[0].startswith("'") and not re.search(r"[a-zA-Z./]", value):
                    found = None  # a plain number may stand for anything
            if found:
                places.append((found.start(), f"{option} {value}" if equals else option))
    return f"{min(places)[1]}: {text}" if places else text


def options_of(parameters: Iterable[Any]) -> dict[str, tuple[str, str]]:
    """Name in Python -> (the option, the option that switches it off), such as "labels": ("--labels", "--no-labels").

    An option without a counterpart stands for both; arguments without a name of their own are left out.
    """
    found = {}
    for parameter in parameters:
        on = next((name for name in parameter.opts if name.startswith("--")), None)
        if on is not None:
            off = next(iter(parameter.secondary_opts), on)
            found[on[2:].replace("-", "_")] = (on, off)
    return found


def in_options(text: str, options: dict[str, tuple[str, str]]) -> str:
    """A message of the library with the names of options.

    Args:
        text: the message.
        options: as `options_of` gives them.
    """
    known = {**options, **{name: (option, option) for name, option in ELSEWHERE.items()}}
    known = {name: pair for name, pair in known.items() if pair[0].split()[0] in {on for on, _ in options.values()}}
    if not known:
        return text
    name = f"(?P<name>{'|'.join(map(re.escape, sorted(known, key=len, reverse=True)))})"
    forms = (
        rf"`{name}(?:=(?P<value>True|False))?`",
        rf"(?<![\w./=-]){name}=(?P<value>True|False)?(?![\w'\"(\[/-]|\.\w)",
        rf"(?:^|(?<=: )|(?<=; )){name}(?= (?:is|are|has|names) )",
        rf"(?<=\bleave ){name}(?= out\b)",
    )

    def option(found: re.Match[str]) -> str:
        on, off = known[found["name"]]
        return off if found.groupdict().get("value") == "False" else on

    for form in forms:
        text = re.sub(form, option, text)
    return re.sub(r"(--[\w-]+), \1\b", r"\1", text)  # of a message that names both
