"""What every section of a manifest is."""

from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, model_validator


class Section(BaseModel):
    """A part of the manifest: an unknown key is an error, values do not change.

    Attributes:
        renamed: keys of earlier formats and their names now; an old one is refused with the new one in the message.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    renamed: ClassVar[dict[str, str]] = {}

    @model_validator(mode="before")
    @classmethod
    def _refuse_old_names(cls, values: Any) -> Any:
        for old, new in cls.renamed.items():
            if isinstance(values, dict) and old in values:
                raise ValueError(f"the key {old} is now called {new}; rename it")
        return values
