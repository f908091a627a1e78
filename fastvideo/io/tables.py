"""Rows of Parquet files, and of data sets in a folder or on a hub.

Columns are read that have texts, numbers, lists or objects; pictures, sound and bytes are not. No code of a data set is
run: `datasets` doesn't.
"""

import json
import math
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import pyarrow as pa

ROWS = 1000  # read at a time
FILES = (".txt", ".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".parquet")  # no hub id ends like a prompt file
_HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")
_SPLIT = r"(?::(?P<subset>[^:/\[\]]+)(?=:))?(?::(?P<split>[^:/\[\]]+(\[[^\[\]]*\])?))?"
_DATA_SET = re.compile(rf"(?P<name>.+?){_SPLIT}")


class Table(NamedTuple):
    """The names of all columns, and the rows, without columns that can't be read and without empty cells."""

    columns: list[str]
    rows: Iterator[dict[str, Any]]


class FormatError(ValueError):
    """A file or folder whose format isn't read, or that has no prompts where they are looked for."""


class DataSet(NamedTuple):
    """`name`, `name:split` or `name:subset:split`, where the name is that of a folder, or a hub's user/name."""

    name: str
    subset: str | None
    split: str

    @classmethod
    def named(cls, path: str) -> "DataSet | None":
        """None: the path can only be that of a file."""
        parts = _DATA_SET.fullmatch(path)
        if parts is None or Path(path).is_file():
            return None
        hub = _HUB_ID.fullmatch(parts["name"]) and not parts["name"].lower().endswith(FILES)
        if not Path(parts["name"]).is_dir() and (not hub or Path(parts["name"]).parent.is_dir()):
            return None
        return cls(parts["name"], parts["subset"], parts["split"] or "train")


def read_parquet(path: Path) -> Table:
    """The rows of a Parquet file. Raises OSError, and ValueError for a file that is none; reading rows does too."""
    import pyarrow as pa
    from pyarrow.parquet import ParquetFile

    try:
        file = ParquetFile(path)
    except (pa.ArrowException, TypeError) as error:
        raise FormatError(f"not a readable Parquet file: {error}") from error
    schema = file.schema_arrow
    return Table(schema.names, _rows(schema, file.iter_batches(ROWS, columns=_readable(schema))))


def read_data_set(source: DataSet) -> Table:
    """The rows of one split. A hub's data set is downloaded once, all columns of it.

    Raises ValueError, which says what to do, for a data set, subset or split that isn't there.
    """
    import datasets
    from huggingface_hub import is_offline_mode

    name, subset, split = source
    try:
        data = datasets.load_dataset(name, subset, split=split)
    except Exception as error:  # datasets raises two dozen types
        cause = f"Cause: {' '.join(str(error).split())[:300]}"
        if isinstance(error, ValueError):  # the subset or the split; the message names those that there are
            raise ValueError(f"no such part of the data set. {cause}") from error
        if Path(name).is_dir():
            raise FormatError(f"no data set that `datasets` can load from this folder. {cause}") from error
        if is_offline_mode():
            problem = "no such file, and as a hub's data set it isn't downloaded yet: HF_HUB_OFFLINE is set"
        else:
            problem = (
                "no such file, and the hub did not give a data set of this name; for a gated one accept the terms on "
                "its page and set HF_TOKEN; without a network give a file"
            )
        raise ValueError(f"{problem}. {cause}") from error
    schema = data.features.arrow_schema
    return Table(schema.names, _rows(schema, data.select_columns(_readable(schema)).with_format("arrow").iter(ROWS)))


def _readable(schema: "pa.Schema") -> list[str]:
    return [field.name for field in schema if _is_plain(field.type)]


def _is_plain(kind: "pa.DataType") -> bool:
    """Whether values of an Arrow type are JSON values."""
    import pyarrow as pa

    kinds = pa.types
    if kinds.is_dictionary(kind) or kinds.is_list(kind) or kinds.is_large_list(kind) or kinds.is_fixed_size_list(kind):
        return _is_plain(kind.value_type)
    if kinds.is_struct(kind):
        return all(_is_plain(field.type) for field in kind)
    simple = (kinds.is_string, kinds.is_large_string, kinds.is_boolean, kinds.is_integer, kinds.is_floating)
    return isinstance(kind, pa.JsonType) or any(is_kind(kind) for is_kind in (*simple, kinds.is_null))


def _rows(schema: "pa.Schema", batches: Iterable["pa.RecordBatch | pa.Table"]) -> Iterator[dict[str, Any]]:
    for batch in batches:
        for row in batch.to_pylist():
            values = ((name, _value(value, schema.field(name).type)) for name, value in row.items())
            yield {name: value for name, value in values if value is not None}


def _value(value: Any, kind: "pa.DataType") -> Any:
    """A value of an Arrow type as JSON has it. Objects lose their empty keys: Arrow gives all objects the same keys."""
    import pyarrow as pa

    if value is None or (isinstance(value, float) and math.isnan(value)):
        return None
    if isinstance(kind, pa.JsonType):
        return json.loads(value)
    if isinstance(value, list):
        return [_value(part, kind.value_type) for part in value]
    if isinstance(value, dict):
        values = ((field.name, _value(value[field.name], field.type)) for field in kind)
        return {name: part for name, part in values if part is not None}
    return value
