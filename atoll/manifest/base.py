"""What every section of a manifest is."""

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """A part of the manifest: an unknown key is an error, values do not change."""

    model_config = ConfigDict(extra="forbid", frozen=True)
