"""Reading of prompts: plain text with one prompt per line, JSON, JSON Lines, tables (CSV, TSV, Parquet), data sets."""

import csv
import io
import json
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastvideo.cli import FlagError
from fastvideo.io.tables import DataSet, FormatError, Table, read_data_set, read_parquet
from fastvideo.io.words import counted

KEYS = ("prompt", "caption", "text")  # of JSON objects and columns; the first that is there counts
WEIGHT = "weight"  # the key or column of a prompt's weight
FORMATS = "text with one per line, JSON, JSON Lines, CSV, TSV, Parquet, or a data set (a folder or a hub's user/name)"
COLUMN_HELP = "key or column of the prompts in files that have such (None: prompt, caption or text)"
ADVICE = (
    "give text with one prompt per line, a JSON list or JSON Lines of texts or objects with a prompt, caption or text, "
    "or a CSV, TSV or Parquet file or a data set with such a column; --prompt_column takes another name"
)
MOST = 1000.0  # the largest weight: an epoch has as many draws as all weights together
_MARKS = {b"\xef\xbb\xbf": "utf-8", b"\xff\xfe\x00\x00": "utf-32-le", b"\x00\x00\xfe\xff": "utf-32-be"}
_MARKS |= {b"\xff\xfe": "utf-16-le", b"\xfe\xff": "utf-16-be"}  # after UTF-32, whose mark begins alike
_OTHER_SUFFIXES = (".yaml", ".yml", ".toml", ".pkl", ".pickle")  # of text, but no line of it is a prompt
_OTHER_FORMATS = re.compile(r"\s*(%PDF-|%!PS|<\?xml|<!doctype|<html|<svg|\{\\rtf)", re.IGNORECASE)
# Control characters other than white space, and halves of UTF-16 pairs, which JSON's \u can name: not even UTF-8 text.
_NO_TEXT = re.compile(r"[\0-\x08\x0e-\x1f\x7f\ud800-\udfff]")
# The first line of JSON that is spread over lines, or that begins with an object.
_JSON_START = re.compile(r'[\[{]|\[\s*[\[{]|\[?\s*\{\s*"[^"]*"\s*:.*')


@dataclass(frozen=True)
class PromptFile:
    """The prompts of a file, what the file says about each of them, and how many entries were left out."""

    prompts: list[str]
    metadata: list[dict[str, Any]]  # per prompt, the other keys of its JSON object or columns of its row; else empty
    weights: list[float]  # per prompt, how often training takes it, see PromptSampler; 1 unless the file says another
    empty: int  # blank lines, empty texts
    duplicates: int  # repeated prompts

    def __str__(self) -> str:
        left_out = f"{counted(self.empty, 'empty line')} and {counted(self.duplicates, 'duplicate')} left out"
        return f"{counted(len(self.prompts), 'prompt')} ({left_out})"


def read_prompts(path: str | Path, field: str, column: str | None = None, unique: bool = True) -> PromptFile:
    """The prompts of a file or a data set, in order.

    The suffixes .json, .jsonl, .csv, .tsv and .parquet tell the format. In all other files every line is a prompt,
    unless the whole file is JSON: a prompt may begin with a brace and have commas. Text is UTF-8, or UTF-16 with or
    without mark. Cells beside a prompt that are JSON lists or objects are read as such; empty cells are left out. A
    folder, or user/name of a hub where no such path is, is a data set, see `DataSet`.

    Args:
        column: the key or column of the prompts. None: the first of KEYS that is there. Plain lines have none.
        unique: a repeated prompt is kept once, with its first metadata and weight.

    Raises FlagError about the setting `field` for a file that is missing, isn't text, has no prompts, or has an entry
    that is none. The message names the bad lines: if they were skipped, nobody would notice the missing prompts. About
    another format it ends with those that are read.
    """
    try:
        found = [_checked(*entry) for entry in _entries(path, (column,) if column else KEYS)]
    except OSError as error:
        raise FlagError(field, path, error.strerror or str(error)) from error
    except FormatError as error:
        raise FlagError(field, path, f"{error}; {ADVICE}") from error
    except ValueError as error:
        raise FlagError(field, path, str(error)) from error
    if found and not found[-1][0]:
        found.pop()  # nothing follows the last line feed
    entries = [entry for entry in found if entry[0]]
    if not entries:
        raise FlagError(field, path, "no prompts in it")
    first: dict[str, tuple[str, dict[str, Any], float]] = {}
    for entry in entries:
        first.setdefault(entry[0], entry)
    kept = list(first.values()) if unique else entries
    prompts, metadata, weights = map(list, zip(*kept, strict=True))
    return PromptFile(prompts, metadata, weights, len(found) - len(entries), len(entries) - len(kept))


def _entries(path: str | Path, keys: Sequence[str]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """(place, prompt, metadata) of all entries, also of empty ones. Raises OSError and ValueError."""
    suffix = Path(path).suffix.lower()
    if source := DataSet.named(str(path)):
        yield from _of_table(read_data_set(source), keys)
        return
    if suffix == ".parquet":
        yield from _of_table(read_parquet(Path(path)), keys)
        return
    text = _decode(Path(path).read_bytes())
    if suffix in _OTHER_SUFFIXES or _OTHER_FORMATS.match(text):
        raise FormatError("not one of the formats that are read")
    if suffix in (".csv", ".tsv"):
        yield from _column(text, "\t" if suffix == ".tsv" else ",;\t", keys)
    elif (entries := _json_entries(text, named=suffix in (".json", ".jsonl", ".ndjson"))) is not None:
        yield from (_text_of(*entry, keys) for entry in entries)
    else:
        lines = text.split("\n")
        _check_plain(lines, keys)
        yield from ((f"line {number}", line, {}) for number, line in enumerate(lines, start=1))


def _checked(place: str, prompt: str, rest: dict[str, Any]) -> tuple[str, dict[str, Any], float]:
    """(prompt, metadata, weight) of an entry. Raises ValueError for what no file could hold, and for a bad weight."""
    weight = 1.0
    if (value := rest.pop(WEIGHT, None)) is not None:
        weight = checked_weight(value, place)
    for text in (prompt, json.dumps(rest, ensure_ascii=False, allow_nan=False)):
        if _NO_TEXT.search(text):
            raise ValueError(f"{text[:60]!r} has a character that no text has")
    # A line break inside a prompt would make two of it wherever prompts are lines.
    return re.sub(r"\s*\n\s*", " ", prompt.strip()), rest, weight


def checked_weight(value: Any, place: str) -> float:
    """A prompt's weight. Raises ValueError, which names the place, for anything but a number from 0 to MOST."""
    try:
        weight = float("nan" if isinstance(value, bool) else value)
    except (TypeError, ValueError):
        weight = math.nan
    if not 0 <= weight <= MOST:  # NaN neither
        raise ValueError(f"{place}: the weight {value!r} is no number from 0 to {MOST:g}")
    return weight


def _decode(data: bytes) -> str:
    """The text of a file, with line feeds as line ends. Raises ValueError, which names the bad lines."""
    mark = next((mark for mark in _MARKS if data.startswith(mark)), b"")
    encoding, data = _MARKS.get(mark, "utf-8"), data.removeprefix(mark)
    if encoding == "utf-8" and data.count(b"\0") * 4 >= len(data) > 0:  # half of the bytes of English in UTF-16
        encoding = "utf-16-be" if data[::2].count(b"\0") > data[1::2].count(b"\0") else "utf-16-le"
    if encoding == "utf-8":
        _check_lines(data)
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        raise ValueError(f"not {encoding.upper()} text: {error.reason} at byte {error.start}") from error
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    if control := _NO_TEXT.search(text):
        line = text.count("\n", 0, control.start()) + 1
        raise ValueError(f"not a text file: line {line} has the control character {ord(control[0])}")
    return text


def _check_lines(data: bytes) -> None:
    """Raises ValueError, which names lines, for bytes that aren't UTF-8."""
    bad = []
    # Not str.splitlines, which also breaks at U+2028 and would shift the numbers.
    for number, line in enumerate(re.split(rb"\r\n|\r|\n", data), start=1):
        try:
            line.decode("utf-8")
        except UnicodeDecodeError as error:
            bad.append(f"line {number} (byte 0x{line[error.start]:02x} at position {error.start + 1})")
    if bad:
        more = f" and {len(bad) - 5} more" if len(bad) > 5 else ""
        raise ValueError(f"not UTF-8 text: {', '.join(bad[:5])}{more}")


def _json_entries(text: str, named: bool) -> list[tuple[str, Any]] | None:
    """(place, entry) of a JSON list or of JSON Lines. None: not JSON.

    named: the file's name says that it is JSON. Otherwise only lists and lines of texts and objects are taken for it.
    Raises ValueError for JSON with a fault.
    """
    lines = [(number, line) for number, line in enumerate(text.split("\n"), start=1) if line.strip()]
    first = lines[0][1].strip() if lines else ""
    if not named and not first.startswith(("[", "{")):
        return None
    try:
        entries = _parse_json(text, lines)
    except ValueError:
        if named or _JSON_START.fullmatch(first):
            raise
        return None
    return entries if named or all(isinstance(entry, (str, dict)) for _, entry in entries) else None


def _parse_json(text: str, lines: list[tuple[int, str]]) -> list[tuple[str, Any]]:
    try:
        whole = json.loads(text)
    except json.JSONDecodeError as error:
        entries = []
        for number, line in lines:
            try:
                entries.append((f"line {number}", json.loads(line)))
            except (ValueError, RecursionError):
                raise FormatError(f"line {number if entries else error.lineno}: not JSON") from error
        return entries
    except RecursionError as error:
        raise ValueError("JSON with too many levels") from error
    if isinstance(whole, list):
        return [(f"entry {number}", entry) for number, entry in enumerate(whole)]
    return [("line 1", whole)]


def _text_of(place: str, entry: Any, keys: Sequence[str]) -> tuple[str, str, dict[str, Any]]:
    """Place, prompt and metadata of a JSON entry. Raises ValueError, which names the place, if it has no prompt."""
    rest = dict(entry) if isinstance(entry, dict) else {}
    found = next((rest.pop(key) for key in keys if key in rest), None) if isinstance(entry, dict) else entry
    if not isinstance(found, str):
        there = f"; its keys are {', '.join(map(repr, rest))}" if rest else ""
        raise FormatError(f"{place}: neither a text nor an object with a text under {', '.join(keys)}{there[:300]}")
    return place, found, rest


def _cell(value: Any) -> Any:
    """The content of a cell beside a prompt: a text that is a JSON list or object as such."""
    try:
        return json.loads(value) if isinstance(value, str) and value.lstrip().startswith(("[", "{")) else value
    except (ValueError, RecursionError):
        return value


def _find(columns: Sequence[str], keys: Sequence[str]) -> str | None:
    """The name of the prompts' column, in any case: the first of the keys that is there."""
    names = {name.strip().lower(): name for name in reversed(columns)}
    return next((names[key.lower()] for key in keys if key.lower() in names), None)


def _lacking(columns: Sequence[str], keys: Sequence[str]) -> str:
    return f"no column {', '.join(keys)}; the columns are {', '.join(map(repr, columns))[:300]}"


def _of_table(table: Table, keys: Sequence[str]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """The entries of a table. Raises ValueError for one without a column of prompts."""
    column = _find(table.columns, keys)
    if column is None:
        raise FormatError(_lacking(table.columns, keys))
    for number, row in enumerate(table.rows):
        prompt = row.pop(column, "")
        if not isinstance(prompt, str):
            raise FormatError(f"row {number}: {column} is no text but {prompt!r:.60}")
        yield f"row {number}", prompt, {name: _cell(value) for name, value in row.items() if value != ""}


def _column(text: str, delimiters: str, keys: Sequence[str]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """The entries of a CSV table. Raises ValueError, which names the line."""
    headers = []
    try:
        for delimiter in delimiters:
            rows = csv.reader(io.StringIO(text), delimiter=delimiter, strict=True)
            header = [name.strip().lower() for name in next(filter(None, rows), [])]
            if column := _find(header, keys):
                break
            headers.append(header)
        else:
            raise FormatError(f"line 1: {_lacking(max(headers, key=len), keys)}")
        for row in rows:
            if row and len(row) != len(header):
                raise ValueError(f"line {rows.line_num}: {len(row)} fields; the header has {len(header)}")
            others = {name: _cell(cell) for name, cell in zip(header, row, strict=False) if cell.strip()}
            others.pop(column, None)
            yield f"line {rows.line_num}", row[header.index(column)] if row else "", others
    except csv.Error as error:
        raise ValueError(f"line {rows.line_num}: {error}") from error


def _is_entry(line: str, keys: Sequence[str]) -> bool:
    """Whether a line is a JSON object with a prompt."""
    try:
        return line.lstrip().startswith("{") and bool(set(keys) & set(json.loads(line)))
    except (ValueError, RecursionError):
        return False


def _check_plain(lines: list[str], keys: Sequence[str]) -> None:
    """Raises ValueError for plain lines that are a table with a header, and for a JSON object among them."""
    objects = (number for number, line in enumerate(lines, start=1) if _is_entry(line, keys))
    if (number := next(objects, None)) is not None:
        raise ValueError(f"line {number}: a JSON object, the first line is none")
    lines = [line for line in lines if line.strip()]
    for delimiter in "\t,;":
        header = [name.strip().lower() for name in lines[0].split(delimiter)] if lines else []
        names = len(lines) > 1 and all(re.fullmatch(r"[\w .-]{1,30}", name) for name in header)
        if names and _find(header, keys) and all(line.count(delimiter) >= len(header) - 1 for line in lines):
            raise ValueError("line 1: the header of a table; name the file .csv or .tsv")
