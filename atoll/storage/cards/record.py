"""What every card is, and how plain values are validated as one."""

from collections.abc import Mapping
from typing import Any, ClassVar, Final, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from atoll.errors import AtollError

FORMAT: Final = 1


def refuse_renamed(values: Any, renamed: Mapping[str, str]) -> None:
    """Raise ValueError if `values` has a key of an earlier format. renamed: the old names, and what they are now."""
    for old, new in renamed.items():
        if isinstance(values, dict) and old in values:
            raise ValueError(f"the key {old} is now called {new}; rename it")


class CardRecord(BaseModel):
    """An object in a card: an unknown key is an error, values do not change.

    Attributes:
        renamed: keys of earlier formats and their names now; an old one is refused with the new one in the message.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, populate_by_name=True)
    renamed: ClassVar[dict[str, str]] = {}

    @model_validator(mode="before")
    @classmethod
    def _refuse_old_names(cls, values: Any) -> Any:
        refuse_renamed(values, cls.renamed)
        return values

    def plain(self) -> dict[str, Any]:
        """Return what JSON holds: the keys that were set, in the order of the class."""
        return self.model_dump(mode="json", by_alias=True, exclude_unset=True)


class Card(CardRecord):
    """The whole content of a JSON file.

    Attributes:
        remedy: what replaces a card of this kind that is damaged; the end of error messages.
        many_files: the card lists files without end, and may be larger than others.
    """

    many_files: ClassVar[bool] = False
    remedy: ClassVar[str] = "get the artifact from its author again"
    format: Literal[1] = FORMAT
    kind: str

    def plain(self) -> dict[str, Any]:
        """Return what JSON holds; format and kind stand first, whether they were set or not."""
        return {"format": self.format, "kind": self.kind, **super().plain()}


CardT = TypeVar("CardT", bound=Card)
RecordT = TypeVar("RecordT", bound=CardRecord)


def parse_record(kind: type[RecordT], content: Any, where: str, remedy: str = "") -> RecordT:
    """Validate plain values as a record.

    Args:
        kind: the class.
        content: what JSON gave.
        where: the file, for messages.
        remedy: what to do about a value that is refused; "": nothing is said.

    Raises:
        AtollError: one line with the first value that is refused, or all keys that are missing.
    """
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
        raise AtollError(f"{where}: this is a card of kind {content['kind']!r:.40}; expected {wanted!r}")
    return parse_record(kind, content, where, kind.remedy)


def _problem(error: ValidationError) -> str:
    """The first problem in a few words: the key, what was got, what was expected."""
    problems = error.errors(include_url=False)
    if missing := [_key(one["loc"]) for one in problems if one["type"] == "missing"]:
        return f"lacks {', '.join(missing)}"
    first = problems[0]
    key = _key(first["loc"])
    prefix = f"{key}: " if key else ""
    if first["type"] == "extra_forbidden":
        return f"unknown key {key}"
    if first["type"] == "value_error":
        return f"{prefix}{first['msg'].removeprefix('Value error, ')}"
    expected = first["msg"].removeprefix("Input should ").removeprefix("be ")
    return f"{prefix}got {first['input']!r:.60}, expected {expected[0].lower()}{expected[1:]}"


def _key(location: tuple[int | str, ...]) -> str:
    return ".".join(f"{part:.60}" if isinstance(part, str) else str(part) for part in location)
