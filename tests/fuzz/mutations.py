"""Random damage to files: JSON and YAML by value, everything else by byte. The same seed makes the same damage."""

import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import yaml

# What a hostile or broken writer would put in place of a value.
VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 2, 3, 7, 10**6, 10**12, 10**30, -(10**18), 0.5, -0.5, 1e-300, 1e300),
    *("", "x", "../../../etc/hostname", "/etc/hostname", "$HOME/x", "~/x", "owner/name", "https://example.org/x"),
    *("a\x1b[2Jb", "\u202egpj.exe", "x" * 100_000, "0" * 64, "nan", "card.json"),
    *([], {}, [0], [1, 2, 3], [[[]]], {"a": {"b": 1}}, [10**9, 10**9, 10**9], ["x", 1, None], {"name": "hash"}),
)
RAW = ("NaN", "Infinity", "1e999", "[" * 5000, "{", "", '"', "\ud800")


def mutate_file(path: Path, rng: random.Random) -> str:
    """Damage a file in place. Returns where: a JSON path such as "sampling.steps", or "bytes"."""
    if path.suffix in (".json", ".yaml", ".jsonl") and rng.random() < 0.85:
        return _mutate_text(path, rng)
    path.write_bytes(mutate_bytes(path.read_bytes(), rng))
    return "bytes"


def mutate_bytes(data: bytes, rng: random.Random) -> bytes:
    """Flip, cut, repeat, overwrite, insert or empty."""
    place = rng.randrange(max(len(data), 1))
    length = rng.choice((1, 1, 2, 8, 64, 512))
    actions: tuple[Callable[[], bytes], ...] = (
        lambda: data[:place] + bytes([rng.randrange(256)]) + data[place + 1 :],
        lambda: data[:place] + rng.randbytes(length) + data[place + length :],
        lambda: data[:place] + bytes(length) + data[place + length :],
        lambda: data[:place] + b"\xff" * length + data[place + length :],
        lambda: data[:place],
        lambda: data[:place] + data[place + length :],
        lambda: data[:place] + rng.randbytes(length) + data[place:],
        lambda: data + rng.randbytes(length),
        lambda: data + data[-length:] * rng.choice((1, 100)),
        lambda: b"",
        # Headers hold lengths: damage among the first bytes is the most dangerous.
        lambda: rng.randbytes(min(length, 8)) + data[min(length, 8) :],
        lambda: _mutate_header(data, rng),
    )
    return rng.choice(actions)()


def _mutate_header(data: bytes, rng: random.Random) -> bytes:
    """Damage a value of a safetensors header, with its length remade; of other files, the first 8 bytes."""
    length = int.from_bytes(data[:8], "little")
    if not 2 < length < len(data) or data[8:9] != b"{":
        return rng.randbytes(8) + data[8:]
    header = json.loads(data[8 : 8 + length])
    mutate_value(header, rng)
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data[8 + length :]


def _mutate_text(path: Path, rng: random.Random) -> str:
    """Damage one value of a JSON, YAML or JSON-lines file."""
    text = path.read_text()
    if path.suffix == ".yaml":
        value = yaml.safe_load(text)
        where = mutate_value(value, rng)
        path.write_text(yaml.safe_dump(value))
        return where
    lines = text.splitlines() if path.suffix == ".jsonl" else [text]
    number = rng.randrange(len(lines))
    value = json.loads(lines[number])
    where = mutate_value(value, rng, raw=True)
    # A placeholder, since Python's JSON writes neither NaN nor broken text.
    lines[number] = json.dumps(value)
    for raw in RAW:
        lines[number] = lines[number].replace(json.dumps(f"RAW{raw}"), raw)
    path.write_bytes("\n".join(lines).encode("utf-8", "surrogatepass"))
    return where


def mutate_value(value: Any, rng: random.Random, raw: bool = False) -> str:
    """Damage one place of a nested value. Returns its path, with list positions left out."""
    places = list(_places(value, ""))
    if not places:
        return ""
    container, key, where = rng.choice(places)
    action = rng.random()
    if action < 0.12:
        del container[key]
    elif action < 0.2 and isinstance(container, dict):
        container[rng.choice(("extra", "__class__", "a" * 300))] = container[key]
        where = f"{where}+"
    elif action < 0.28 and isinstance(container[key], list) and container[key]:
        container[key] = container[key] * rng.choice((2, 1000))
    elif action < 0.36 and isinstance(container[key], int | float) and not isinstance(container[key], bool):
        container[key] = container[key] * rng.choice((-1, 2, 10, 1e3, 1e6)) + rng.choice((0, 1))
    elif action < 0.44 and isinstance(container[key], str):
        container[key] = _mutate_string(container[key], rng)
    elif raw and action < 0.5:
        container[key] = f"RAW{rng.choice(RAW)}"
    else:
        container[key] = rng.choice(VALUES)
    return where


def _mutate_string(text: str, rng: random.Random) -> str:
    place = rng.randrange(len(text) + 1)
    return rng.choice((text[:place], f"{text[:place]}\x1b{text[place:]}", text.upper(), f"../{text}", f"{text}/."))


def _places(value: Any, path: str) -> Iterator[tuple[Any, Any, str]]:
    """Every (container, key, path) of a nested value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, one in items:
        where = f"{path}.{key}".lstrip(".") if isinstance(value, dict) else path
        yield value, key, where
        yield from _places(one, where)
