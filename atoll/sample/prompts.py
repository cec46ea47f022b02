"""Prompts, from the command line or from a file.

A prompt file has one prompt per line. If its first line is a JSON object, every line is one:
{"prompt": "...", "negative_prompt": "...", "seed": 7, "n": 4}, of which only the prompt is needed.
"""

import json
import re
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, Any

from atoll.errors import AtollError
from atoll.sample.options import ImageOptions, PromptImages, PromptLine
from atoll.storage import bounds
from atoll.storage.cards import parse_record

STANDARD_INPUT = "-"
_LINE_BYTES = 2 << 20  # a JSON line with two prompts of 65,536 characters as escapes
_FILE_BYTES = 1 << 30  # of standard input and pipes, which are copied to a temporary file
_CONTROL = re.compile(r"[\x00-\x08\x0a-\x1f\x7f]")  # a tab is text


def prompt_lines(texts: Sequence[str]) -> list[PromptLine]:
    """Return prompts of the command line as lines. Raises AtollError for one that is too long."""
    return [_line({"prompt": text}, f"prompt {number}") for number, text in enumerate(texts, start=1)]


@contextmanager
def open_requests(
    texts: Sequence[str] | None, source: str | None, options: ImageOptions
) -> Iterator[Callable[[], Iterator[PromptImages]]]:
    """Yield a function that returns the images to sample, prompt by prompt, from the start at each call.

    Args:
        texts: prompts of the command line.
        source: a prompt file, in their place.
        options: seeds, numbers and negative prompt.

    Raises:
        AtollError: as `open_prompts` and `prompt_lines` do.
    """
    # The command line is in memory already; a file is read line by line.
    if source is None:
        lines = prompt_lines(texts or ())
        yield lambda: options.images(lines, "prompt")
        return
    with open_prompts(source) as read:
        yield lambda: options.images(read(), f"{_shown(source)}: line")


@contextmanager
def open_prompts(source: str) -> Iterator[Callable[[], Iterator[PromptLine]]]:
    """Open a prompt file, and yield a function that reads it from the start, line by line.

    Args:
        source: a path, or "-" for standard input.

    Raises:
        AtollError: the file cannot be read; while reading: no prompt, or a line that is empty, too long, no text, or
            another kind of JSON.
    """
    name = _shown(source)
    with ExitStack() as stack:
        # Standard input stays open: it is not ours.
        try:
            file = sys.stdin.buffer if source == STANDARD_INPUT else stack.enter_context(Path(source).open("rb"))
        except OSError as error:
            reason = error.strerror
            raise AtollError(f"{name}: cannot be read ({reason}); expected a file with one prompt per line") from None
        # It is read several times: to check all of it before sampling, and to sample.
        if source == STANDARD_INPUT or not file.seekable():
            copy = stack.enter_context(tempfile.TemporaryFile())
            _copy(file, copy, name)
            yield lambda: _read(copy, name)
        else:
            yield lambda: _read(file, name)


def _shown(source: str) -> str:
    """Return what a prompt file is called in messages."""
    return "standard input" if source == STANDARD_INPUT else source


def _copy(source: IO[bytes], target: IO[bytes], name: str) -> None:
    """Copy what can be read only once."""
    # Bounded: a pipe may never end.
    total = 0
    while block := source.read(1 << 20):
        total += len(block)
        if total > _FILE_BYTES:
            raise AtollError(f"{name}: has more than {_FILE_BYTES:,} bytes; expected one prompt per line")
        target.write(block)


def _read(file: IO[bytes], name: str) -> Iterator[PromptLine]:
    """Read a prompt file from its start."""
    file.seek(0)
    as_json = None
    for number, raw in enumerate(iter(lambda: file.readline(_LINE_BYTES + 1), b""), start=1):
        where = f"{name}: line {number}"
        text = _text(raw, where, first=number == 1)
        # The first line decides. A prompt that begins with a brace is no JSON object as a rule.
        if as_json is None:
            as_json = name.endswith((".jsonl", ".ndjson")) or isinstance(_json_or_none(text), dict)
        if as_json and not isinstance(content := _json_or_none(text), dict):
            raise AtollError(f'{where} is no JSON object; expected {{"prompt": "..."}}, as every line of JSON lines')
        yield _line(content if as_json else {"prompt": text}, where)
    if as_json is None:
        raise AtollError(f"{name}: is empty; expected one prompt per line")


def _text(raw: bytes, where: str, first: bool) -> str:
    """Decode a line that is not empty."""
    if len(raw) > _LINE_BYTES:
        raise AtollError(f"{where} has more than {_LINE_BYTES:,} bytes; expected one prompt per line")
    # A byte order mark is not part of the first prompt.
    try:
        text = raw.decode("utf-8-sig" if first else "utf-8").rstrip("\r\n")
    except UnicodeDecodeError:
        text = "\0"
    if _CONTROL.search(text):
        raise AtollError(f"{where} is no UTF-8 text; expected one prompt per line")
    if not text.strip():
        raise AtollError(f"{where} is empty; remove it (the empty prompt means no condition)")
    return text


def _json_or_none(text: str) -> Any:
    """Parse JSON; None if it is none."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _line(content: Any, where: str) -> PromptLine:
    """Validate one line."""
    line = parse_record(PromptLine, content, where)
    for text in (line.prompt, line.negative_prompt or ""):
        # JSON can hold half a character, and a NUL.
        try:
            size = len(text.encode())
        except UnicodeEncodeError:
            raise AtollError(f"{where}: a prompt that is no valid Unicode; expected text") from None
        if "\0" in text:
            raise AtollError(f"{where}: a prompt with a NUL character; expected text")
        # An encoder reads some 3,000 bytes at most; a longer one is no prompt.
        if size > bounds.MAX_CAPTION_BYTES:
            raise AtollError(f"{where}: a prompt of {size:,} bytes; expected at most {bounds.MAX_CAPTION_BYTES:,}")
    return line
