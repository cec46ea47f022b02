"""Captioners of `atoll recaption`: a command that reads and writes JSON lines, or a Python function."""

import base64
import importlib
import io
import json
import os
import shlex
import subprocess
import sys
import threading
from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import numpy as np
from PIL import Image

from atoll.data.caption_lists import captions_of
from atoll.data.limits import MAX_LINE
from atoll.data.names import clean, message_of
from atoll.data.types import Unfit
from atoll.errors import AtollError
from atoll.manifest import DataSettings
from atoll.storage.memory import refuse_out_of_memory

_PATIENCE = 10  # seconds in which a command that closed its output ends by itself


@dataclass(frozen=True, eq=False)
class CaptionRequest:
    """An image for a captioner.

    Attributes:
        key: of the sample.
        caption: its own first caption; "" if it has none.
        pixels: [H, W, 3] uint8; None where the captioner opens the file itself.
        path: of the file; None where it gets the pixels.
    """

    key: str
    caption: str
    pixels: np.ndarray | None
    path: str | None


class Captioner(ABC):
    """Returns the captions of images, batch by batch; a context manager."""

    @abstractmethod
    def __call__(self, batch: Sequence[CaptionRequest]) -> list[Any]:
        """Return for each image a text, a list of captions, or None.

        Raises:
            AtollError: the captioner died, or answered something else.
        """

    def close(self) -> str:
        """End after the last batch. Returns a warning, "" if there is none."""
        return ""

    def __enter__(self) -> "Captioner":
        return self

    def __exit__(  # noqa: B027 (a function has nothing to end)
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass


class Command(Captioner):
    """A program that gets a line of JSON per image and answers each with one, see docs/data.md.

    It is started once, without a shell. What it writes to stderr appears on the terminal.

    Args:
        command: the program with its arguments.
    """

    def __init__(self, command: str):
        try:
            arguments = shlex.split(command)
        except ValueError as error:
            raise AtollError(f"--command: {command!r} cannot be split into arguments ({error})") from None
        if not arguments:
            raise AtollError("--command: is empty; name a program, such as --command 'python caption.py'")
        self._arguments, self._name, self._lines = arguments, clean(command), 0

    def __enter__(self) -> "Command":
        # Python buffers what it writes to a pipe: a program that never flushes would wait for more lines for ever.
        environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
        try:
            self._process = subprocess.Popen(
                self._arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment
            )
        except OSError as error:
            name = self._arguments[0]
            raise AtollError(f"--command: {clean(name)!r} cannot be started ({message_of(error)})") from None
        return self

    def __call__(self, batch: Sequence[CaptionRequest]) -> list[Any]:
        # Lines are sent in a thread: a program that answers at once would fill its pipe while more are sent.
        lines = "".join(json.dumps(_request(image), ensure_ascii=False) + "\n" for image in batch).encode()
        sending = threading.Thread(target=self._send, args=(lines,), daemon=True)
        sending.start()
        answers: dict[str, Any] = {}
        keys = [image.key for image in batch]
        while len(answers) < len(batch):
            key, captions = self._answer(keys, answers)
            answers[key] = captions
        sending.join()
        return [answers[key] for key in keys]

    def close(self) -> str:
        """Close the program's input and wait for its end."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with suppress(OSError):  # it has ended
            self._process.stdin.close()
        how, rest = self._how(), 0
        while self._process.stdout.readline(MAX_LINE):
            rest += 1
        if rest:
            return f"the captioner wrote {rest:,} more lines than images; they are left out"
        if not how:
            return "the captioner went on after its last answer, and was stopped"
        return "" if how == "exit code 0" else f"the captioner ended with {how} after its last answer"

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            with suppress(OSError):  # what was still to be sent has no reader
                if pipe is not None:
                    pipe.close()

    def _send(self, lines: bytes) -> None:
        assert self._process.stdin is not None
        with suppress(OSError, ValueError):  # it has ended, which its answers tell
            self._process.stdin.write(lines)
            self._process.stdin.flush()

    def _answer(self, keys: Sequence[str], answers: dict[str, Any]) -> tuple[str, Any]:
        """Read an answer to one of these keys that is not among the answers."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline(MAX_LINE + 1)
        if not line.endswith(b"\n") and len(line) <= MAX_LINE:
            count = f"after {len(answers):,} of {len(keys):,} answers to a batch"
            part = f", in the middle of a line ({clean(line.decode(errors='replace'))!r})" if line else ""
            raise AtollError(f"--command: {self._name} {self._gone()} {count}{part}; {_REMEDY}")
        self._lines += 1
        where = f"--command: line {self._lines} of the answers"
        if len(line) > MAX_LINE:
            raise AtollError(f"{where} has more than {MAX_LINE:,} bytes; {_REMEDY}")
        got = f"got {clean(line.decode(errors='replace').strip())!r:.160}"
        try:
            answer = json.loads(line)
        except (ValueError, RecursionError):
            raise AtollError(
                f'{where} is no JSON; expected {{"key": ..., "captions": [...]}}, {got}; {_REMEDY}'
            ) from None
        if not isinstance(answer, dict) or not isinstance(answer.get("key"), str) or "captions" not in answer:
            raise AtollError(f'{where}: expected {{"key": ..., "captions": [...]}}, {got}; {_REMEDY}')
        key = answer["key"]
        if key in answers:
            raise AtollError(f"{where}: the key {key!r:.200} is answered twice; {_REMEDY}")
        if key not in keys:
            raise AtollError(
                f"{where}: the key {key!r:.200} is none of this batch, such as {keys[0]!r:.200}; {_REMEDY}"
            )
        return key, answer["captions"]

    def _gone(self) -> str:
        """How a program ended whose answers have ended; one that still runs is killed."""
        # Its input stays open: a thread may be writing to it, which closing would wait for.
        how = self._how()
        return f"ended with {how}" if how else "closed its output, and was stopped,"

    def _how(self) -> str:
        """Wait for the program's end: "signal 9", "exit code 1"; "" if it goes on, and is killed."""
        try:
            code = self._process.wait(timeout=_PATIENCE)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
            return ""
        return f"signal {-code}" if code < 0 else f"exit code {code}"


class Function(Captioner):
    """A Python function: it gets a list of {key, image, path, caption} and returns the captions in the same order.

    Args:
        name: "module:function"; the module is looked for in the current directory, too.
    """

    def __init__(self, name: str):
        module, colon, function = name.partition(":")
        if not (module and colon and function):
            raise AtollError(f"--python: {name!r}; expected MODULE:FUNCTION, such as captions:describe")
        # As for `python -m`.
        if "" not in sys.path:
            sys.path.insert(0, "")
        self._name = clean(name)
        try:
            self._function = getattr(importlib.import_module(module), function)
        except Exception as error:  # whatever a module does when it is imported
            refuse_out_of_memory(error, clean(module))
            raise AtollError(f"--python: {self._name} cannot be imported ({_described(error)})") from error
        if not callable(self._function):
            raise AtollError(f"--python: {self._name} is a {type(self._function).__name__}, expected a function")

    def __call__(self, batch: Sequence[CaptionRequest]) -> list[Any]:
        arguments = [
            {
                "key": image.key,
                "caption": image.caption,
                **({"path": image.path} if image.pixels is None else {"image": Image.fromarray(image.pixels)}),
            }
            for image in batch
        ]
        try:
            answers = self._function(arguments)
        except Exception as error:  # whatever a function raises
            refuse_out_of_memory(error, self._name)
            raise AtollError(f"--python: {self._name} raised {_described(error)}; {_REMEDY}") from error
        if not isinstance(answers, list | tuple) or len(answers) != len(batch):
            what = f"{len(answers):,}" if isinstance(answers, list | tuple) else f"a {type(answers).__name__}"
            raise AtollError(f"--python: {self._name} returned {what} for {len(batch):,} images; {_REMEDY}")
        return list(answers)


_REMEDY = "what is done is kept: mend it, and run the same command again"


def checked(image: CaptionRequest, captions: Any, where: str) -> Any:
    """Return the captions of an answer. Raises AtollError if they are none."""
    try:
        captions_of(captions, DataSettings())
        json.dumps(captions, allow_nan=False)
    except (Unfit, TypeError, ValueError) as error:
        raise AtollError(f"{where}: the answer to {image.key!r:.200}: {error}; {_REMEDY}") from None
    return captions


def _request(image: CaptionRequest) -> dict[str, str]:
    """Return the line for an image: its key, its own caption, and its path or its pixels as PNG in base64."""
    if image.pixels is None:
        return {"key": image.key, "caption": image.caption, "path": image.path or ""}
    sink = io.BytesIO()
    Image.fromarray(image.pixels).save(sink, "png", compress_level=1)
    return {"key": image.key, "caption": image.caption, "image": base64.b64encode(sink.getvalue()).decode()}


def _described(error: BaseException) -> str:
    return f"{type(error).__name__}: {message_of(error)}"
