"""Read metadata files row by row in bounded memory: JSON lines, CSV, TSV, JSON and parquet."""

import csv
import io
import json
from collections.abc import Callable, Collection, Iterator
from typing import Any, NamedTuple

from atoll.data.captions import encoding_of, is_usual
from atoll.data.limits import MAX_JSON_BYTES, MAX_LINE
from atoll.data.names import clean, listed, message_of
from atoll.data.opening import TooLarge, open_file, read_whole
from atoll.data.parquet_rows import plain_rows
from atoll.data.types import Damaged, Unfit
from atoll.errors import AtollError

FORMATS = (".jsonl", ".ndjson", ".csv", ".tsv", ".parquet", ".json")
# Columns that name the image: those of Hugging Face datasets, kohya and open_clip, and other usual names.
FILE_COLUMNS = (
    "file_name",
    "image_path",
    "filepath",
    "file_path",
    "filename",
    "image_file",
    "image_name",
    "image",
    "path",
    "file",
)

Record = dict[str, Any]


class TableRow(NamedTuple):
    """A row that is parsed when `record` is called, which may raise Unfit; `where` is its file and line."""

    where: str
    record: Callable[[], Record]


def rows_of(url: str, name: str, encoding: str, wanted: Collection[str] = ()) -> Iterator[TableRow]:
    """Yield the rows of a metadata file; the extension of its name decides the format.

    A line that cannot be read does not affect other lines.

    Args:
        url: path or URL of the file.
        name: name of the file, for messages and for its format.
        encoding: encoding of text without a byte order mark.
        wanted: columns of a parquet file to read beside the usual ones; other formats yield all columns.

    Raises:
        AtollError: the file cannot be read, has no column for file names, or is a kind of JSON that holds no rows.
    """
    kind = next((kind for kind in FORMATS if name.lower().endswith(kind)), "")
    codec = encoding
    try:
        if kind == ".parquet":
            yield from _parquet(url, name, wanted)
        elif kind == ".json":
            yield from _json(url, name, encoding)
        else:
            with open_file(url) as raw:
                file = io.BufferedReader(raw) if not hasattr(raw, "peek") else raw
                codec = encoding_of(file.peek(3)[:3], encoding)
                # surrogateescape: a bad byte affects only its own line
                text = io.TextIOWrapper(file, codec, errors="surrogateescape", newline="")
                yield from (_csv if kind in (".csv", ".tsv") else _json_lines)(text, name)
    except UnicodeError as error:
        raise AtollError(f"{clean(name)}: not {codec} ({message_of(error)}); set data.encoding") from error
    except OSError as error:
        raise AtollError(f"{clean(name)}: cannot be read ({message_of(error)})") from error


def columns_of(url: str, name: str, encoding: str) -> list[str]:
    """Return the columns of the first row of a possible table; empty if it is no table or cannot be read."""
    try:
        return list(next(iter(rows_of(url, name, encoding))).record())
    except (AtollError, Unfit, StopIteration):
        return []


def file_column(columns: list[str], wanted: str | None) -> str:
    """Return the column that names the images.

    Raises:
        Unfit: there is none, or a row names several images.
    """
    if wanted is not None:
        if wanted in columns:
            return wanted
        raise Unfit(
            f"no {wanted}, which data.file_name names, in this line; it has {clean(', '.join(columns)) or 'nothing'}"
        )
    for name in FILE_COLUMNS:
        if name in columns:
            return name
    # Hugging Face accepts prefixed columns, such as mask_file_name, one for each image of a row.
    ours = [name for name in columns if name.endswith("_file_name")]
    if len(ours) == 1:
        return ours[0]
    lists = [name for name in columns if name == "file_names" or name.endswith("_file_names")]
    if ours or lists:
        raise Unfit(f"it names several images ({listed(ours or lists)}); data.file_name chooses one column")
    raise Unfit(f"no file_name in this line; it has {clean(', '.join(columns)) or 'nothing'}")


def _lines(text: io.TextIOWrapper) -> Iterator[str | None]:
    """Yield the lines of a text; None instead of a line longer than `MAX_LINE` characters."""
    while line := text.readline(MAX_LINE + 1):
        if len(line) <= MAX_LINE:
            yield line
            continue
        # Drop the rest of the long line in pieces.
        while line and not line.endswith(("\n", "\r")):
            line = text.readline(MAX_LINE)
        yield None


def _too_long() -> Record:
    raise Unfit(f"this line has more than {MAX_LINE:,} characters")


def _json_lines(text: io.TextIOWrapper, name: str) -> Iterator[TableRow]:
    for number, line in enumerate(_lines(text), 1):
        if line is None:
            yield TableRow(f"{clean(name)}:{number}", _too_long)
        elif line.strip():
            yield TableRow(f"{clean(name)}:{number}", lambda line=line: _object(_parse(line)))  # type: ignore[misc]


def _parse(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise Unfit(f"this line is no JSON ({message_of(error)})") from None


def _object(value: Any) -> Record:
    if not isinstance(value, dict):
        raise Unfit(f"this line is a {type(value).__name__}, expected an object")
    return value


def _csv(text: io.TextIOWrapper, name: str) -> Iterator[TableRow]:
    """Yield rows of comma-separated values, or tab-separated if the header has a tab; places are last lines."""
    # The header decides the delimiter, whatever the extension of the file.
    lines = _lines(text)
    first = next(lines, "") or ""
    cut = False

    def whole() -> Iterator[str]:
        nonlocal cut
        yield first
        for line in lines:
            # A long line becomes an empty one; the flag makes its row fail.
            cut = cut or line is None
            yield line or "\n"

    reader = csv.reader(whole(), delimiter="\t" if "\t" in first else ",", strict=True)

    def parse(cells: list[str] | csv.Error, cut: bool) -> Record:
        if cut:
            return _too_long()
        if isinstance(cells, csv.Error):
            raise Unfit(f"this line is no CSV ({message_of(cells)})")
        if len(cells) != len(header):
            raise Unfit(f"this line has {len(cells)} cells, the header has {len(header)}")
        return dict(zip(header, cells, strict=True))

    # The header is the first row. Later errors concern one row each, so reading continues.
    header: list[str] = []
    while True:
        try:
            cells: list[str] | csv.Error = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            cells = error
        if not header:
            header = cells if isinstance(cells, list) else []
            if not header:
                raise AtollError(f"{clean(name)}: no header line with names of columns such as file_name")
        elif cells != [] or cut:
            # Default arguments bind the current values: the row is parsed later.
            yield TableRow(f"{clean(name)}:{reader.line_num}", lambda cells=cells, cut=cut: parse(cells, cut))  # type: ignore[misc]
            cut = False


def _json(url: str, name: str, encoding: str) -> Iterator[TableRow]:
    """Yield rows of a list of objects, of kohya's objects by image name, or of JSON lines under a wrong name."""
    try:
        with open_file(url) as file:
            data = read_whole(file, MAX_JSON_BYTES)
    except TooLarge:
        limit = f"more than {MAX_JSON_BYTES >> 20:,} MiB, which a JSON file is parsed in as a whole"
        raise AtollError(f"{clean(name)}: {limit}; write one object a line, as .jsonl") from None
    # A JSON file is parsed as a whole.
    codec = encoding_of(data[:3], encoding)
    try:
        text = data.decode(codec, "surrogateescape")
        content = json.loads(text)
    except RecursionError:
        raise AtollError(f"{clean(name)}: JSON that is nested too deeply") from None
    except UnicodeError:
        raise
    except ValueError as error:
        # "Extra data" means that a second value follows: probably JSON lines.
        if "Extra data" not in str(error):
            raise AtollError(f"{clean(name)}: no JSON ({message_of(error)})") from None
        again = io.BytesIO(text.encode("utf-8", "surrogateescape"))
        yield from _json_lines(io.TextIOWrapper(again, "utf-8", "surrogateescape", newline=""), name)
        return
    # A single object with a file name is a table of one row.
    if isinstance(content, dict) and any(column in content for column in FILE_COLUMNS):
        content = [content]
    if isinstance(content, list):
        for number, value in enumerate(content, 1):
            yield TableRow(f"{clean(name)}:{number}", lambda value=value: _object(value))  # type: ignore[misc]
        return
    if not isinstance(content, dict) or any(isinstance(value, list) for value in content.values()):
        keys = listed(list(content)) if isinstance(content, dict) else type(content).__name__
        raise AtollError(
            f"{clean(name)}: a JSON of another kind ({keys}); expected a list of objects, or objects by images' names"
        )
    for key, value in content.items():
        # kohya: each key is the name of an image; a bare value is its caption.
        record = value if isinstance(value, dict) else {"caption": value}
        yield TableRow(f"{clean(name)}:{clean(key)}", lambda key=key, record=record: {**record, "file_name": key})  # type: ignore[misc]


def _parquet(url: str, name: str, wanted: Collection[str]) -> Iterator[TableRow]:
    def is_wanted(column: str) -> bool:
        # Other columns, such as embeddings, may be large and are not read.
        usual = column in FILE_COLUMNS or column.endswith("file_name") or column.lower() == "split"
        return usual or is_usual(column) or column in wanted

    try:
        for number, record in enumerate(plain_rows(url, is_wanted), 1):
            yield TableRow(f"{clean(name)}:{number}", lambda record=record: record)  # type: ignore[misc]
    except Damaged as error:
        raise AtollError(f"{clean(name)}: cannot be read ({error})") from None
