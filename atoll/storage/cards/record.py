"""The base classes of all cards, and the validation of plain values as a card."""

from collections.abc import Mapping
from typing import Any, ClassVar, Final, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from atoll.errors import AtollError

FORMAT: Final = 1


def refuse_renamed(values: Any, renamed: Mapping[str, str]) -> None:
    """Raise ValueError if `values` has a key of an earlier format. renamed: old names and their new ones."""
    # Otherwise the message would only be "unknown key", without the new name.
    for old, new in renamed.items():
        if isinstance(values, dict) and old in values:
            raise ValueError(f"the key {old} is now called {new}; rename it")


class CardRecord(BaseModel):
    """An object in a card: an unknown key is an error, values do not change.

    Attributes:
        renamed: keys of earlier formats and their names now; an old one is refused with the new one in the message.
    """

    # Unknown keys are errors, because a misspelled one would otherwise be ignored silently.
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, populate_by_name=True)
    renamed: ClassVar[dict[str, str]] = {}

    @model_validator(mode="before")
    @classmethod
    def _refuse_old_names(cls, values: Any) -> Any:
        refuse_renamed(values, cls.renamed)
        return values

    def plain(self) -> dict[str, Any]:
        """Return JSON values: the keys that were set, in the order of the class."""
        # Unset keys stay out, so that a card that is read and written again gains no keys.
        return self.model_dump(mode="json", by_alias=True, exclude_unset=True)


class Card(CardRecord):
    """The whole content of a JSON file.

    Attributes:
        remedy: how to replace a damaged card of this kind; ends error messages.
        many_files: the card lists an unlimited number of files, so it may be larger than others.
    """

    many_files: ClassVar[bool] = False
    remedy: ClassVar[str] = "get the artifact from its author again"
    format: Literal[1] = FORMAT
    kind: str

    def plain(self) -> dict[str, Any]:
        """Return JSON values. format and kind come first and are always included."""
        # Readers check format and kind before anything else.
        return {"format": self.format, "kind": self.kind, **super().plain()}


CardT = TypeVar("CardT", bound=Card)
RecordT = TypeVar("RecordT", bound=CardRecord)


def parse_record(kind: type[RecordT], content: Any, where: str, remedy: str = "") -> RecordT:
    """Validate plain values as a record.

    Args:
        kind: the class of the record.
        content: the parsed JSON.
        where: the file, for messages.
        remedy: the fix for a refused value, which ends the message; default "", no fix.

    Raises:
        AtollError: one line with the first value that is refused, or all keys that are missing.
    """
    # pydantic reports every problem; the message needs one.
    try:
        return kind.model_validate(content)
    except ValidationError as error:
        problem = _problem(error)
        raise AtollError(f"{where}: {problem}{f'; {remedy}' if remedy else ''}") from None


def parse_card(kind: type[CardT], content: Any, where: str) -> CardT:
    """Validate the content of a card's file.

    Raises:
        AtollError: another format or kind, a key that is missing or unknown, a value out of bounds.
    """
    # Format and kind first: for a card of another version every key could be wrong.
    wanted = kind.model_fields["kind"].default
    if not isinstance(content, dict) or "format" not in content or "kind" not in content:
        raise AtollError(f"{where}: not a card of Atoll; expected a JSON object with format and kind")
    if content["format"] != FORMAT:
        newer = isinstance(content["format"], int) and content["format"] > FORMAT
        raise AtollError(
            f"{where}: format {content['format']!r:.40}, this version of atoll reads format {FORMAT}; "
            f"{'update atoll' if newer else 'export it again'}"
        )
    if content["kind"] != wanted:
        hint = "; `atoll merge` makes an expert of it" if (content["kind"], wanted) == ("lora", "expert") else ""
        raise AtollError(f"{where}: this is a card of kind {content['kind']!r:.40}; expected {wanted!r}{hint}")
    return parse_record(kind, content, where, kind.remedy)


def _problem(error: ValidationError) -> str:
    """Describe the first problem in a few words: the key, the value, the expected value."""
    problems = error.errors(include_url=False)
    # Missing keys are listed together, since they usually have one cause.
    if missing := [_key(one["loc"]) for one in problems if one["type"] == "missing"]:
        return f"lacks {', '.join(missing)}"
    # Only the first of the others: later ones often follow from it.
    first = problems[0]
    key = _key(first["loc"])
    prefix = f"{key}: " if key else ""
    # Each kind of problem has its own wording.
    if first["type"] == "extra_forbidden":
        return f"unknown key {key}"
    if first["type"] == "value_error":
        return f"{prefix}{first['msg'].removeprefix('Value error, ')}"
    expected = first["msg"].removeprefix("Input should ").removeprefix("be ")
    return f"{prefix}got {first['input']!r:.60}, expected {expected[0].lower()}{expected[1:]}"


def _key(location: tuple[int | str, ...]) -> str:
    """Join the path to a key with dots."""
    # Keys are cut, because a stranger chooses their length.
    return ".".join(f"{part:.60}" if isinstance(part, str) else str(part) for part in location)
