"""WebDataset tars, as img2dataset writes them: 00000.tar with 000000000.jpg, 000000000.txt, 000000000.json, ..."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from atoll.data.caption_lists import captions_of, combined, first_and_others, joined_note
from atoll.data.captions import (
    FROM_FILE,
    FROM_FOLDER,
    SIDECARS,
    caption_from_name,
    check_encoding,
    field_of,
    key_of,
    like_captions,
    split_of,
)
from atoll.data.companions import companion_suffix, is_always_companion
from atoll.data.crop import Box
from atoll.data.fingerprint import Listing, content_fingerprint, fingerprint
from atoll.data.focus import box_of
from atoll.data.limits import MAX_SIDECAR_BYTES
from atoll.data.locate import IMAGES, config_of, locate
from atoll.data.names import canonical, clean, listed, message_of, printable
from atoll.data.opening import ahead, join, read_file
from atoll.data.splits import HELD_OUT, named_splits
from atoll.data.tar_members import RULES, Member, members
from atoll.data.types import UNREAD_CAPTIONS, Block, Damaged, Raw, Skipped, Source, Unfit
from atoll.manifest import DataSettings
from atoll.storage.shards import Split, Weighted, split_by_hash

SUFFIXES = (".tar", ".tar.gz", ".tgz")
_DOT = (
    "a dot in the name: by WebDataset's rule it ends the sample's key, so that several images are one sample; "
    "data.key_until: last-dot reads such names"
)


@dataclass
class _Sample:
    """Consecutive members with one key.

    Attributes:
        key: the key as the first member spells it.
        members: extension -> content; None if it is not needed or cannot be read.
        reasons: extension -> why it has no content.
    """

    key: str
    members: dict[str, bytes | None] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)


class _Part(NamedTuple):
    """One tar.

    Attributes:
        url: path or URL.
        name: prefix of its keys.
        size: bytes.
        split: split that its name implies, if any.
        damage: why it is not opened; "" if it is.
    """

    url: str
    name: str
    size: int
    split: Split | None = None
    damage: str = ""


class Tars(Source):
    """Read tars; one tar is one block and is streamed.

    A sample is a run of members with one name up to the first dot (or the last one, by `data.key_until`). Its
    image is the member with the extension `data.image`, else the first of the usual ones. Its caption is the member
    with the extension `data.caption`, or that field of its json; else the first of txt, caption, ... that is not empty,
    and of the json the usual fields in their order. `data.key`, `data.split` and `data.focus` name fields of the
    json.

    Keys: "<the tar's path relative to the common root, without .tar>/<the sample's name>", unless `data.key` is set.

    Skipped are samples without an image, the second of two with one key, members that a dot in their name hides, and
    everything after damage: the samples before it are yielded, the one that it interrupts is not, because its end is
    unknown. Masks and other companions of images are skipped too, and are counted separately.

    Raises:
        AtollError: no tar matches the path.
    """

    name = "webdataset"

    def __init__(self, data: DataSettings):
        check_encoding(data.encoding)
        self._data = data
        self._files = locate(data.path or (), "tars", SUFFIXES, gaps=data.missing_shards)
        self.root = self._files.root
        self._images = IMAGES if data.image is None else (data.image.lower().removeprefix("."),)
        named = [name.lower().removeprefix(".") for name, _ in data.captions if name]
        # Members with other extensions are never read, which keeps their content out of memory.
        self._wanted = {*self._images, *SIDECARS, *named}
        self._notes: list[str] = []
        self._splits: dict[str, Split] = {}
        # Names of tars and folders imply splits only if the settings do not decide.
        if data.split is None and data.splits == "auto":
            self._splits, notes = named_splits(list(self._files.sizes), "tars")
            self._notes += notes
        if missing := self._files.missing:
            self._notes.append(f"{len(missing):,} tars of a range are not there: {listed(list(missing))}")
        self._blocks: list[Block] | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Drop the list of files: a block carries all that a worker needs."""
        return {**self.__dict__, "_files": None, "_blocks": None, "_splits": {}}

    def blocks(self) -> list[Block]:
        if self._blocks is None:
            # Counting samples reads side files, so it happens only when blocks are needed.
            names, blocks = list(self._files.sizes), []
            for name, count in zip(names, _counts(self.root, names), strict=True):
                short = name.removesuffix(".tar")
                part = _Part(self._files.url(name), short, self._files.sizes[name], self._splits.get(name))
                blocks.append(Block(short, count, part, (name,)))
            # A link or pipe still gets a block, so that it is reported as skipped.
            for name, reason in self._files.unopened.items():
                part = _Part(self._files.url(name), name.removesuffix(".tar"), 0, damage=f"it is {reason}")
                blocks.append(Block(part.name, None, part))
            self._blocks = blocks
        return self._blocks

    def notes(self) -> list[str]:
        return self._notes

    def read(self, block: Block) -> Iterator[Raw | Skipped]:
        part: _Part = block.content
        samples, seen = 0, set[str]()
        waiting: list[_Sample] = []  # possible companions of an image that follows
        try:
            if part.damage:
                raise Damaged(part.damage)
            for sample in _samples(members(part.url, part.size, self._wanted, RULES[self._data.key_until])):
                samples += 1
                name = canonical(sample.key)
                base = self._companion_of(sample)
                # The image came first, or the name alone proves a companion.
                if base in seen or (base is not None and is_always_companion(name)):
                    yield _left_out(part, sample)
                    continue
                # The image may still follow: hold the sample back.
                if base is not None and name not in seen:
                    waiting.append(sample)
                    continue
                # "cat-mask" sorts before "cat.jpg": now it is known whether that follows.
                for other in waiting:
                    if self._companion_of(other) == name:
                        yield _left_out(part, other)
                    else:
                        yield from self._decode(part, other, again=False)
                        seen.add(canonical(other.key))
                # All candidates are resolved; the current sample itself can be decoded.
                waiting.clear()
                yield from self._decode(part, sample, again=name in seen)
                # The canonical name, so that a repeat in another spelling is detected.
                seen.add(name)
            for other in waiting:
                yield from self._decode(part, other, again=False)
        except Damaged as error:
            for other in waiting:
                yield from self._decode(part, other, again=False)
            yield Skipped(printable(part.name), f"tar: {error}; {samples:,} samples were read before that")
        else:
            # An empty tar is reported, because an empty block would pass unnoticed.
            if not samples:
                yield Skipped(printable(part.name), "tar: it holds no samples")

    def config(self) -> dict[str, Any]:
        return config_of(self.name, self._data)

    def fingerprint(self) -> str:
        """Return the sha256 over the relative name and the size of every tar."""
        if self._data.fingerprint == "content":
            return content_fingerprint(self.root, list(self._files.sizes))
        return fingerprint(self._files.sizes.items())

    def listing(self) -> Listing:
        return self._files.listing(self._files.sizes)

    def _companion_of(self, sample: _Sample) -> str | None:
        """Return the key of the image that a sample may accompany as a mask; a captioned sample is no companion."""
        pair = companion_suffix(canonical(sample.key)) if self._data.companions == "skip" else None
        if pair is None or any(sample.members.get(kind) for kind in SIDECARS):
            return None
        return pair[0] if any(kind in sample.members for kind in self._images) else None

    def _decode(self, part: _Part, sample: _Sample, again: bool) -> Iterator[Raw | Skipped]:
        key = f"{part.name}/{sample.key}"
        # "my.photo.jpg" ends its key at "my": report each such image instead of losing it.
        hidden = self._hidden_images(sample)
        if hidden and not any(kind in sample.members for kind in self._images):
            yield from (Skipped(printable(f"{part.name}/{name}"), _DOT) for name in hidden)
            return
        try:
            # The first sample with a key wins; a repeat means that its members were scattered.
            if again:
                which = _list(sample)
                raise Unfit(f"key: twice in its tar (again with {which}); a sample's members must lie together")
            if printable(key) != key:
                raise Unfit("key: its name is not utf-8; rename it")
            # Test the image first: without it the json need not be parsed.
            image = self._image(sample)
            facts = _Json(sample.members.get("json"))
            read = [self._captions(sample, facts, name) for name, _ in self._data.captions]
            weights = [weight for _, weight in self._data.captions]
            caption, others = first_and_others(combined([(own, w) for (own, _), w in zip(read, weights, strict=True)]))
            notes = tuple(note for _, more in read for note in more)
            if hidden and self._data.image is None:
                notes = (*notes, f"images beside the first of a sample, not read ({listed(hidden)})")
            key = key_of(facts[self._data.key]) if self._data.key is not None else key
            focus, more = self._focus(facts)
            yield Raw(key, image, caption, self._split(part, key, facts), (*notes, *more), others, focus)
        except Unfit as error:
            yield Skipped(printable(key), str(error))

    def _hidden_images(self, sample: _Sample) -> list[str]:
        """Return the members that are images by their last extension but have another dot before it."""
        dotted = (kind.rpartition(".") for kind in sample.members if "." in kind and kind not in self._images)
        return [f"{sample.key}.{before}" for before, _, last in dotted if last in IMAGES]

    def _image(self, sample: _Sample) -> bytes:
        # The usual extensions are tried in order of preference.
        for kind in self._images:
            if (content := sample.members.get(kind)) is not None:
                return content
        # An image that could not be read explains more than "no image".
        if reason := next((sample.reasons[kind] for kind in self._images if kind in sample.reasons), None):
            raise Unfit(f"image: {reason}")
        expected = ", ".join(self._images[:5]) + (", ..." if len(self._images) > 5 else "")
        raise Unfit(f"image: none among its members ({_list(sample)}); expected {expected}")

    def _captions(self, sample: _Sample, facts: "_Json", wanted: str | None) -> tuple[list[Weighted], tuple[str, ...]]:
        """Return the captions of a sample for a name of `data.captions`, and notes."""
        if wanted in (FROM_FILE, FROM_FOLDER):
            return captions_of(caption_from_name(f"{sample.key}.", wanted), self._data), ()
        # The name is a member's extension first, then a field of the json.
        kinds: tuple[str, ...] = SIDECARS
        column = None
        if wanted is not None:
            kinds = (wanted.lower().removeprefix("."),)
            if kinds[0] not in sample.members and not wanted.startswith("."):
                kinds, column = ("json",), wanted
        for kind in kinds:
            # A caption that exists but cannot be read fails the sample; falling through would use another text.
            if kind in sample.reasons:
                raise Unfit(f"caption: {kind} is {sample.reasons[kind]}")
            if sample.members.get(kind) is None:
                continue
            value = field_of(facts.all(), column) if kind == "json" else sample.members[kind]
            if captions := captions_of(value, self._data):
                return captions, joined_note(value, sample.key, self._data)
        return [], self._why_no_caption(sample, facts, wanted)

    def _why_no_caption(self, sample: _Sample, facts: "_Json", wanted: str | None) -> tuple[str, ...]:
        """Return a note on members or fields that may hold the caption of a sample without one."""
        fields = facts.all() if sample.members.get("json") is not None else {}
        if wanted is not None:
            there = f"members {_list(sample)}" + (f"; json has {listed(list(fields), 6)}" if fields else "")
            return (f"{UNREAD_CAPTIONS}: no {clean(wanted)}, which data.caption names, in samples ({there})",)
        # Fields with telling names, and members such as "en.txt" that a second dot hides.
        named = like_captions(fields) + [
            kind for kind in sample.members if kind.rpartition(".")[2] in SIDECARS[:-1] and "." in kind
        ]
        if not named and fields:
            return (f"samples whose json has no caption: it has {listed(list(fields), 6)}; data.caption names a field",)
        if named:
            return (f"{UNREAD_CAPTIONS}: samples have {listed(named)}; data.caption names one",)
        return ()

    def _focus(self, facts: "_Json") -> tuple[Box | None, tuple[str, ...]]:
        """Return what must stay inside the crop, and a note if the json does not say."""
        if self._data.focus is None:
            return None, ()
        fields = facts.all()
        if self._data.focus not in fields:
            return None, (f"images without a box (no {clean(self._data.focus)}, which data.focus names, in the json)",)
        return box_of(fields[self._data.focus]), ()

    def _split(self, part: _Part, key: str, facts: "_Json") -> Split:
        if self._data.split is not None:
            return split_of(facts[self._data.split])
        if self._data.splits == "auto":
            # The name of the tar wins over the field of the json.
            if part.split is not None:
                return part.split
            value = facts.peek("split")
            if isinstance(value, str) and value.strip().lower() in HELD_OUT:
                return "val"
        return split_by_hash(key, self._data.validation)


class _Json:
    """The json of a sample, parsed on first use. Raises Unfit if it is invalid or lacks a field."""

    def __init__(self, data: bytes | None):
        self._data = data
        self._fields: dict[str, Any] | None = None

    def __getitem__(self, name: str) -> Any:
        fields = self.all()
        if name not in fields:
            raise Unfit(f"json: no field {name!r}; it has {clean(', '.join(fields)) or 'none'}")
        return fields[name]

    def peek(self, name: str) -> Any:
        """Return a field, or None if the field or a valid json is missing."""
        try:
            return self.all().get(name)
        except Unfit:
            return None

    def all(self) -> dict[str, Any]:
        """Return all fields; no fields without a json."""
        if self._fields is None:
            # Check the size before parsing: parsed JSON takes several times its bytes.
            if self._data is not None and len(self._data) > MAX_SIDECAR_BYTES:
                raise Unfit(f"json: {len(self._data):,} bytes, expected at most {MAX_SIDECAR_BYTES:,}")
            try:
                fields = json.loads(self._data) if self._data is not None else {}
            except (ValueError, RecursionError) as error:
                raise Unfit(f"json: cannot be parsed ({message_of(error)})") from None
            if not isinstance(fields, dict):
                raise Unfit(f"json: is a {type(fields).__name__}, expected an object")
            self._fields = fields
        return self._fields


def _left_out(part: _Part, sample: _Sample) -> Skipped:
    key = printable(f"{part.name}/{sample.key}")
    return Skipped(key, "companion: named after another image; data.companions: train keeps it", failed=False)


def _samples(all_members: Iterator[Member]) -> Iterator[_Sample]:
    """Group members into samples; yield each once the next header or the end mark shows that it is complete.

    A member whose extension its sample already has starts another sample with the same key. Keys that print alike
    (composed and decomposed letters, back slashes) are the same key.
    """
    current: _Sample | None = None
    for member in all_members:
        # Compare the raw keys first: canonical forms cost time and are rarely needed.
        other = current is None or (member.key != current.key and canonical(member.key) != canonical(current.key))
        if current is None or other or member.extension in current.members:
            if current is not None:
                yield current
            current = _Sample(member.key)
        current.members[member.extension] = member.content() if member.content is not None else None
        if member.reason:
            current.reasons[member.extension] = member.reason
    if current is not None:
        yield current


def _list(sample: _Sample) -> str:
    return clean(", ".join(extension or "no extension" for extension in sample.members))


def _counts(root: str | None, names: list[str]) -> Iterator[int | None]:
    """Yield the number of samples of each tar, from the 00000_stats.json that img2dataset writes beside 00000.tar."""

    def count(name: str) -> int | None:
        try:
            stats = json.loads(read_file(join(root, name.removesuffix(".tar") + "_stats.json"), MAX_SIDECAR_BYTES))
        except (OSError, ValueError, RecursionError):
            return None
        number = stats.get("successes", stats.get("count")) if isinstance(stats, dict) else None
        return number if isinstance(number, int) and not isinstance(number, bool) and number >= 0 else None

    yield from ahead(count, names, threads=16)
