"""Command lines from dataclasses: a documented field per flag, and one line for a setting that can't be used.

`--flag_name` and `--flag-name` are the same; every switch has a `--no_` form; the string None means "not set".
"""

import argparse
import difflib
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import MISSING, Field, field, fields
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, TypeVar, get_args, get_origin

import argparse_dataclass

Config = TypeVar("Config")


class FlagError(ValueError):
    """A setting that can't be used. Code that knows no command line raises it; `flag_errors` writes the flag's name.

    Attributes:
        field: name of the setting, as in the dataclass. value: what it was set to; None: the value is not the point.
        problem: what is wrong with it, and what to choose instead; other settings are named there as flags, --name.
    """

    def __init__(self, field: str, value: object, problem: str) -> None:
        self.field, self.value, self.problem = field, value, problem
        super().__init__(field, value, problem)

    def __str__(self) -> str:
        return f"{self.field}: {self.problem}" if self.value is None else f"{self.field} {self.value}: {self.problem}"


@contextmanager
def flag_errors(program: str, names: Mapping[str, str] | None = None) -> Iterator[None]:
    """The edge of a command line: a FlagError ends the program with status 2 and one line that names the flag.

    names: flags that this program calls differently, {field: flag}.
    """
    try:
        yield
    except FlagError as error:
        name = (names or {}).get(error.field, error.field)
        # In one piece: other processes may write the same line at this moment.
        sys.stderr.write(f"{program}: error: --{FlagError(name, error.value, error.problem)}\n")
        raise SystemExit(2) from error


def flag(default: Any, help: str, **metadata: Any) -> Any:
    """A dataclass field with a help sentence and argparse-dataclass metadata (`choices`, ...)."""
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata={"help": help, "nargs": "+", **metadata})
    return field(default=default, metadata={"help": help, **metadata})


def default_of(f: Field) -> Any:
    """A dataclass field's default, a list of its own for each caller."""
    return f.default if f.default_factory is MISSING else f.default_factory()


def is_none(text: str) -> bool:
    return text.lower() in ("none", "null", "")


class _Switch(argparse.Action):
    """`--x` and `--no_x`."""

    def __init__(self, option_strings: Sequence[str], dest: str, **kwargs: Any):
        negative = [option.replace("--", "--no_", 1) for option in option_strings]
        super().__init__([*option_strings, *negative], dest, nargs=0, **kwargs)

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        setattr(namespace, self.dest, not option_string.startswith("--no_"))


class _List(argparse.Action):
    """`--x 1 2`, `--x 1,2` and `--x [1,2]`; None is an empty list."""

    def __init__(self, *args: Any, type: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.convert = type

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        parts = values  # of paths: spaces and commas are theirs
        if self.convert is not Path:
            parts = [part for part in re.split(r"[\s,\[\]]+", " ".join(values)) if not is_none(part)]
        try:
            setattr(namespace, self.dest, [self.convert(part) for part in parts])
        except ValueError:
            parser.error(f"--{self.dest} {' '.join(values)}: expected a list of {self.convert.__name__} values")


class _Parser(argparse_dataclass.ArgumentParser):
    """argparse-dataclass with underscored names, `--no_` forms, None, defaults in --help and one-line errors."""

    def __init__(self, cls: type, **kwargs: Any):
        self._by_name = {f.name: f for f in fields(cls)}
        super().__init__(cls, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **kwargs)

    def add_argument(self, *names: str, **kwargs: Any) -> argparse.Action:
        f = self._by_name.get(kwargs.get("dest", names[0][2:].replace("-", "_")) if names[0][:2] == "--" else None)
        if f is None:
            return super().add_argument(*names, **kwargs)
        help = f"{f.metadata['help']} (default: {default_of(f)})".replace("%", "%%")
        if f.type is bool:
            return super().add_argument(
                f"--{f.name}", action=_Switch, dest=f.name, default=kwargs["default"], help=help
            )
        kwargs["help"] = help
        if get_origin(f.type) is list:
            kwargs |= {"action": _List, "type": get_args(f.type)[0]}
        if get_origin(f.type) is UnionType:  # int | None, which argparse-dataclass doesn't know
            inner = next(a for a in get_args(f.type) if a is not NoneType)
            automatic = f.metadata.get("none")  # what None is called besides
            choices = kwargs.get("choices", ())  # of which "none" may be one

            def convert(text: str) -> Any:
                return None if (is_none(text) and text not in choices) or text == automatic else inner(text)

            convert.__name__ = inner.__name__  # argparse's errors name it
            kwargs["type"] = convert
            if choices:
                kwargs["choices"] = [*choices, None]
        return super().add_argument(f"--{f.name}", **kwargs)

    def error(self, message: str) -> Any:
        self.exit(2, f"{self.prog}: error: {message} (--help lists the flags)\n")


def parse_dataclass(
    cls: type[Config], argv: Sequence[str] | None = None, doc: str = "", ignored: Sequence[str] = ()
) -> Config:
    """Parse a command line into the dataclass `cls`. A ValueError of its validation ends the program with one line.

    Flags named in `ignored` are accepted, with their value, and warned about in one line. If the class has a
    `create(**explicit)` constructor, it is called with just the flags that were given.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = _Parser(cls, description=doc)
    kept: list[str] = []
    skipping = False
    for token in argv:
        if not re.match(r"--[A-Za-z]", token):
            if not skipping:
                kept.append(token)
            continue
        name, equals, value = token.partition("=")
        name = name.replace("-", "_").replace("__", "--", 1)
        skipping = name[2:] in ignored or name.removeprefix("--no_") in ignored
        if skipping:
            print(f"warning: {name} has no effect here and is ignored", file=sys.stderr)
        else:
            kept.append(name + equals + value)
    namespace, unknown = argparse.ArgumentParser.parse_known_args(parser, kept)
    if unknown:
        close = difflib.get_close_matches(unknown[0], parser._option_string_actions, 1)
        parser.error(f"unknown flag {unknown[0]}" + (f"; did you mean {close[0]}?" if close else ""))
    explicit = {name: value for name, value in vars(namespace).items() if value is not argparse_dataclass.MISSING}
    try:
        return getattr(cls, "create", cls)(**explicit)
    except FlagError as error:
        parser.error(f"--{error}")
    except ValueError as error:
        parser.error(str(error))
