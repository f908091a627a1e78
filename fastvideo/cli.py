"""Command lines from dataclasses: one documented field per flag, and one line for a setting that can't be used.

`--flag_name` and `--flag-name` are the same; every switch has a `--no_` form; the text None means "not set". The word
`--override` stands between a recipe's flags, the environment's and those given by hand: where two exclude each other,
the later one counts. `--config FILE.yaml` stands for the flags in a file, one `name: value` per line. The flags beside
it count more than the file, and the file more than what stands before the last `--override`.

A program reads its command line before it imports torch, so that --help and a refused flag answer at once:

    from fastvideo.cli import check_fields, flag, flag_errors, parse_dataclass, parse_first

    @dataclass
    class Settings:
        batch_size: int = flag(8, "images per forward pass", at_least=1)

        def __post_init__(self) -> None:
            check_fields(self)

    if __name__ == "__main__":
        parse_first(Settings, doc=__doc__)

    import torch

    @flag_errors("program.py")
    def main(argv: Sequence[str] | None = None) -> None:
        settings = parse_dataclass(Settings, argv, __doc__)  # what parse_first has read

    if __name__ == "__main__":
        main()
"""

import argparse
import difflib
import inspect
import io
import math
import operator
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import MISSING, Field, field, fields, make_dataclass
from itertools import groupby
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, TypeVar, get_args, get_origin

from fastvideo.familiar_flags import answer
from fastvideo.io.messages import end, say, shorten_interrupts

import argparse_dataclass

Config = TypeVar("Config")


class FlagError(ValueError):
    """A setting that can't be used. Code that knows no command line raises it; `flag_errors` writes the flag's name.

    Attributes:
        field: name of the setting, as in the dataclass.
        value: what it was set to. None: the value is not the point.
        problem: what is wrong, and what to choose instead. Other settings are named there as flags, --name.
    """

    def __init__(self, field: str, value: object, problem: str) -> None:
        self.field, self.value, self.problem = field, value, problem
        super().__init__(field, value, problem)

    def __str__(self) -> str:
        return f"{self.field if self.value is None else written(self.field, self.value)}: {self.problem}"


def written(name: str, value: object) -> str:
    """A setting as on the command line, without the two dashes: `name value`, or `name` and `no_name` for a switch."""
    if isinstance(value, bool):
        return name if value else f"no_{name}"
    return f"{name} {' '.join(map(str, value)) if isinstance(value, list) else value}"


class FlagErrors(FlagError):
    """Several settings that can't be used, one line each."""

    def __init__(self, errors: Sequence[FlagError]) -> None:
        super().__init__(errors[0].field, errors[0].value, errors[0].problem)
        self.errors = errors


def raised(checks: Iterable[Callable[[], object]]) -> Iterator[FlagError]:
    """The FlagErrors of checks, each of which raises one if something can't be used."""
    for check in checks:
        try:
            check()
        except FlagError as error:
            yield error


@contextmanager
def flag_errors(program: str, names: Mapping[str, str] | None = None) -> Iterator[None]:
    """The edge of a command line, a decorator of `main` too: a FlagError ends the program with one line and status 2,
    FlagErrors with several lines.

    Any other error is a fault of the code and keeps its traceback. names: flags that this program calls differently,
    {field: flag}.
    """
    try:
        yield
    except FlagError as error:
        found = error.errors if isinstance(error, FlagErrors) else [error]
        named = [FlagError((names or {}).get(e.field, e.field), e.value, e.problem) for e in found]
        end("".join(f"{program}: error: --{_one_line(error)}\n" for error in named), 2)


def _one_line(text: object) -> str:
    """A value or a library's message may have line breaks."""
    return " ".join(str(text).splitlines())


BOUNDS = {
    "at_least": (operator.ge, "at least"),
    "above": (operator.gt, "above"),
    "at_most": (operator.le, "at most"),
    "below": (operator.lt, "below"),
}

LARGEST = {bool: 1, int: 2**63 - 1, float: 3e38}  # what tensors of int64 and float32 hold


def flag(default: Any, help: str, **metadata: Any) -> Any:
    """A dataclass field with a help sentence.

    Keywords, all optional: `choices` and `metavar` as in argparse; keys of BOUNDS, the range (`at_least=1`); `none`,
    one more word for None; `alias`, another name of the flag; `algorithms`, the only ones that read the field (see
    config.py); `section`, the title in --help above this field and the next ones; `names`, a function that says in
    --help which values there are.
    """
    known = {*BOUNDS, "choices", "metavar", "none", "alias", "algorithms", "section", "names"}
    assert metadata.keys() <= known, f"unknown keyword in {metadata}"
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata={"help": help, "nargs": "+", **metadata})
    return field(default=default, metadata={"help": help, **metadata})


def check_fields(config: Any) -> None:
    """Raises FlagError for the first field that is empty, not finite, out of its range or none of its choices.

    argparse checks the choices of a command line; this also serves callers that make the object themselves.
    """
    for f in fields(config):
        value, optional = getattr(config, f.name), get_origin(f.type) is UnionType
        if optional and value is None:
            continue
        if isinstance(value, str) and not optional and not value.strip():
            raise FlagError(f.name, repr(value), "must not be empty")
        if isinstance(value, float) and not math.isfinite(value):
            raise FlagError(f.name, value, "must be a finite number")
        bounds = [(*BOUNDS[key], bound) for key, bound in f.metadata.items() if key in BOUNDS]
        if not all(holds(value, bound) for holds, _, bound in bounds):
            wanted = " and ".join(f"{words} {bound}" for _, words, bound in bounds)
            raise FlagError(f.name, value, f"must be {wanted}" + ", or None" * optional)
        if isinstance(value, int | float) and abs(value) > LARGEST[type(value)]:
            raise FlagError(f.name, value, f"must be at most {LARGEST[type(value)]:.3g}")
        choices = f.metadata.get("choices")
        for chosen in (value if isinstance(value, list) else [value]) if choices else []:
            if chosen in choices:
                continue
            empty = ["none"] if isinstance(value, list) else []
            raise FlagError(f.name, chosen, choose_from([*choices, *empty], chosen))


def choose_from(choices: Iterable[Any], chosen: object) -> str:
    """What there is to choose from, and which of it may be meant by `chosen`, for messages."""
    names = {str(choice).lower(): str(choice) for choice in choices}
    alike = {name: difflib.SequenceMatcher(None, name, str(chosen).lower()).ratio() for name in names}
    near = max(alike, key=alike.__getitem__)  # the first of several: hpsv2 for hps
    return f"choose from {', '.join(names.values())}" + f"; did you mean {names[near]}?" * (alike[near] >= 0.6)


def default_of(f: Field) -> Any:
    """A dataclass field's default. Each caller gets a list of its own."""
    return f.default if f.default_factory is MISSING else f.default_factory()


def sections(cls: type) -> dict[str, list[Field]]:
    """Titles of --help -> fields. First the titles in the attribute SECTIONS, then the class's own, then its bases'."""
    by_name = {f.name: f for f in fields(cls)}
    found: dict[str, list[Field]] = {title: [] for title in getattr(cls, "SECTIONS", ())}
    for owner in cls.__mro__:
        title = "flags"
        for name in inspect.get_annotations(owner):
            if f := by_name.pop(name, None):
                title = f.metadata.get("section", title)
                found.setdefault(title, []).append(f)
    return found


def is_none(text: str) -> bool:
    return text.lower() in ("none", "null", "")


METAVARS = {"int": "N", "float": "X", "Path": "PATH"}  # what --help writes for a value of the type


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
            given = list(filter(None, re.split(r"[\s,\[\]]+", " ".join(values))))
            parts = [part for part in given if not is_none(part)]
            if parts and len(parts) < len(given):
                raise argparse.ArgumentError(self, f"{' '.join(values)}: none is no part of a list; it stands alone")
        try:
            setattr(namespace, self.dest, [self.convert(part) for part in parts])
        except ValueError:
            problem = f"{' '.join(values)}: expected a list of {self.convert.__name__} values"
            raise argparse.ArgumentError(self, problem) from None


class _Parser(argparse_dataclass.ArgumentParser):
    """argparse-dataclass with underscored names, `--no_` forms, None, defaults in --help and one-line errors."""

    def __init__(self, cls: type, **kwargs: Any):
        titles = {f.name: title for title, found in sections(cls).items() for f in found}
        self._by_name = {name: cls.__dataclass_fields__[name] for name in titles}
        self._titles, self._groups = titles, {}
        self._other_defaults: dict[str, list[str]] = getattr(cls, "other_defaults", dict)()
        ordered = make_dataclass(cls.__name__, [(f.name, f.type, f) for f in self._by_name.values()])
        usage, kind = "%(prog)s [--config FILE] [--flag VALUE ...]", argparse.RawDescriptionHelpFormatter
        super().__init__(ordered, allow_abbrev=False, formatter_class=kind, usage=usage, **kwargs)
        super().add_argument(CONFIG, metavar="FILE", default=argparse.SUPPRESS, help=CONFIG_HELP)

    def add_argument(self, *names: str, **kwargs: Any) -> argparse.Action:
        f = self._by_name.get(kwargs.get("dest", names[0][2:].replace("-", "_")) if names[0][:2] == "--" else None)
        if f is None:
            return super().add_argument(*names, **kwargs)
        values = f"; {f.metadata['names']()}" if "names" in f.metadata else ""
        default = "; ".join([str(default_of(f)), *self._other_defaults.get(f.name, ())])
        help = f"{f.metadata['help']}{values} (default: {default})".replace("%", "%%")
        title = self._titles[f.name]
        group = self._groups.get(title) or self._groups.setdefault(title, self.add_argument_group(title))
        if f.type is bool:
            return group.add_argument(f"--{f.name}", action=_Switch, dest=f.name, default=kwargs["default"], help=help)
        kwargs["help"] = help
        if get_origin(f.type) is list:
            kwargs |= {"action": _List, "type": get_args(f.type)[0]}
            kwargs.pop("choices", None)  # check_fields knows them; argparse sees "a,b" as one word
        if get_origin(f.type) is UnionType:  # int | None, which argparse-dataclass doesn't know
            inner = next(a for a in get_args(f.type) if a is not NoneType)
            automatic = f.metadata.get("none")  # what None is called besides
            choices = kwargs.get("choices", ())  # of which "none" may be one

            def convert(text: str) -> Any:
                return None if (is_none(text) and text not in choices) or text == automatic else inner(text)

            convert.__name__ = inner.__name__  # argparse's errors name it
            kwargs["type"] = convert
            if choices:
                kwargs |= {"choices": [*choices, None], "metavar": f"{{{','.join(map(str, choices))}}}"}
        if not kwargs.get("choices"):
            kwargs.setdefault("metavar", METAVARS.get(kwargs["type"].__name__, "TEXT"))
        aliases = [f"--{f.metadata['alias']}"] if "alias" in f.metadata else []
        return group.add_argument(f"--{f.name}", *aliases, **kwargs)

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            wanted = choose_from([choice for choice in action.choices if choice is not None], value)
            raise argparse.ArgumentError(action, f"invalid choice: {value!r}; {wanted}")

    def given(self, argv: Sequence[str]) -> dict[str, Any]:
        """{name: value} of the flags in a command line."""
        namespace, unknown = argparse.ArgumentParser.parse_known_args(self, argv)
        if unknown:
            name = unknown[0].partition("=")[0]
            if name.startswith("-"):
                self.error(f"unknown flag {name}{self._answer(name.lstrip('-'))}")
            owners = [f"--{f.name} {name}" for f in self._by_name.values() if name in f.metadata.get("choices", ())]
            advice = f"; did you mean {' or '.join(owners)}?" if owners else ""
            self.error(f"{name} is the value of no flag{advice}")
        return {name: value for name, value in vars(namespace).items() if value is not argparse_dataclass.MISSING}

    def _answer(self, unknown: str) -> str:
        known = [option[2:] for option in self._option_string_actions if option[:2] == "--" and option != "--help"]
        return answer(unknown, known)

    def read_file(self, path: str) -> list[str]:
        """The settings of a YAML file as a command line: `h: 512` as --h=512.

        A value is its text in the file, read as on the command line: 1e-4 is a number, and errors are the same.
        """
        import yaml

        try:
            node = yaml.compose(Path(path).read_text(encoding="utf-8"), yaml.SafeLoader)
        except (OSError, ValueError, yaml.YAMLError) as error:
            self.error(f"{CONFIG} {path}{_why_no_yaml(error)}")
        if Path(path).name == "args.json":
            self.error(f"{CONFIG} {path}: records a run; config.yaml beside it starts the run again")
        if not isinstance(node, yaml.MappingNode | None):
            self.error(f"{CONFIG} {path}: expected lines of `name: value`")
        words: list[str] = []
        seen: set[str] = set()
        for key, value in node.value if node else ():
            name = str(key.value).replace("-", "_")
            option = self._option_string_actions.get(f"--{name}")
            where = f"{CONFIG} {path}, line {key.start_mark.line + 1}: {name}"
            if option is None or option.dest not in self._by_name or name.startswith("no_"):
                self.error(f"{where}: unknown name{self._answer(name)}")
            if option.dest in seen:
                self.error(f"{where}: is there twice")
            seen.add(option.dest)
            kind = self._by_name[option.dest].type
            parts = value.value if isinstance(value, yaml.SequenceNode) and get_origin(kind) is list else [value]
            if not all(isinstance(part, yaml.ScalarNode) for part in parts):
                self.error(f"{where}: expected {'a list of values' if get_origin(kind) is list else 'one value'}")
            texts = ["None" if part.tag.endswith(":null") else part.value for part in parts]
            if kind is bool:
                if not value.tag.endswith(":bool"):
                    self.error(f"{where}: {texts[0]}: expected true or false")
                words.append(f"--{name}" if yaml.SafeLoader.bool_values[texts[0].lower()] else f"--no_{name}")
                continue
            words += [f"--{name}", *(texts or ["None"])] if parts is value.value else [f"--{name}={texts[0]}"]
            try:
                if get_origin(kind) is list:
                    option(self, argparse.Namespace(), texts)
                else:
                    self._check_value(option, self._get_value(option, texts[0]))
            except argparse.ArgumentError as error:
                self.error(f"{where}: {error.message}")
        return words

    def error(self, message: str) -> Any:
        end(f"{self.prog}: error: {_one_line(message)} (--help lists the flags)\n", 2)


def _why_no_yaml(error: Exception) -> str:
    """What follows the name of a file that can't be read as YAML: the line, and what belongs there."""
    mark = getattr(error, "problem_mark", None)
    if mark is None:
        return f": {getattr(error, 'strerror', None) or error}"
    wanted = "each line is `name: value` without spaces before the name; a text with `: ` or ` #` goes in quotes"
    return f", line {mark.line + 1} or the one before: {wanted} (YAML: {error.problem})"


OVERRIDE, CONFIG = "--override", "--config"  # see the module's first lines
CONFIG_HELP = "YAML file of flags, one `name: value` per line; flags given beside it count more"
_READ: dict[type, Any] = {}  # what parse_first has read, by class, until the program's main asks for it
# Turns a command line of another program, with underscores, into (this program's, notes to print).
Translate = Callable[[Sequence[str]], tuple[list[str], list[str]]]


def parse_first(
    cls: type, argv: Sequence[str] | None = None, doc: str = "", translate: Translate | None = None
) -> None:
    """parse_dataclass before the slow imports: the program's `main`, which asks for argv None, gets the result. From
    here on Ctrl-C ends the program with one line.
    """
    shorten_interrupts()
    _READ[cls] = parse_dataclass(cls, argv, doc, translate)


def parse_dataclass(
    cls: type[Config], argv: Sequence[str] | None = None, doc: str = "", translate: Translate | None = None
) -> Config:
    """Parses a command line into the dataclass `cls`. A FlagError of its validation ends the program with one line.

    If the class has a `create(**explicit)` constructor, it is called with just the flags that were given. If it has a
    method `outdone(before, after)`, this names the flags before an OVERRIDE that flags after it exclude. A method
    `other_defaults()` gives --help what else may be the default: {field: texts}.

    Args:
        argv: None is the process's own command line, which `parse_first` may have read already.
        translate: called with the command line before it is parsed. Its notes are printed if the settings can be used.
    """
    if argv is None and cls in _READ:
        return _READ.pop(cls)
    _write_any_letter()
    aliases = {f.metadata["alias"]: f.name for f in fields(cls) if "alias" in f.metadata}
    argv = [_plain(word, aliases) for word in (sys.argv[1:] if argv is None else argv)]
    parser = _Parser(cls, description=doc)
    argv = _with_files(argv, parser.read_file)
    argv, notes = translate(argv) if translate else (argv, [])
    explicit: dict[str, Any] = {}
    for given in map(parser.given, _split(argv)):
        for name, by in getattr(cls, "outdone", lambda *_: {})(explicit, given).items():
            notes.append(
                f"note: --{written(name, explicit.pop(name))} isn't used, because --{written(by, given[by])} is given "
                "after it"
            )
        explicit |= given
    try:
        settings = getattr(cls, "create", cls)(**explicit)
        check_fields(settings)
    except FlagError as error:
        parser.error(f"--{error}")
    say(*notes)
    return settings


def _write_any_letter() -> None:
    """A terminal or pipe of ASCII alone gets other letters as escapes, instead of an error after all the work."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _split(argv: Sequence[str]) -> list[list[str]]:
    """The parts of a command line between OVERRIDE words."""
    return [list(part) for override, part in groupby(argv, lambda word: word == OVERRIDE) if not override]


def _with_files(argv: Sequence[str], read: Callable[[str], list[str]]) -> list[str]:
    """The command line with the flags of its files, as parts of their own before the flags that they stand beside."""
    result: list[str] = []
    for part in _split(argv):
        words, rest = iter(part), []
        for word in words:
            name, equals, path = word.partition("=")
            if name == CONFIG:
                result += [*read(path if equals else next(words, "")), OVERRIDE]
            else:
                rest.append(word)
        result += [*rest, OVERRIDE]
    return result


def _plain(word: str, aliases: Mapping[str, str]) -> str:
    """--flag-name=value -> --flag_name=value, where an alias gives way to the flag's first name."""
    if not re.match(r"--[A-Za-z]", word):
        return word
    name, equals, value = word[2:].partition("=")
    name = name.replace("-", "_")
    return f"--{aliases.get(name, name)}{equals}{value}"
