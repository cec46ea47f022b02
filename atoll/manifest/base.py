"""What every section of a manifest is, and the YAML around it."""

from typing import Any, ClassVar

import yaml
from pydantic import BaseModel, ConfigDict, model_validator

from atoll.errors import AtollError

_MAX_VALUES = 1_000_000  # of a YAML file with aliases. LAION-5B has 232,000 shards


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


def parse_yaml(text: str, where: str) -> Any:
    """Parse YAML that may be somebody else's; `where` begins the messages.

    Raises:
        AtollError: not YAML, nested too deeply, or aliases that describe a huge value in a few lines.
    """
    try:
        # Parsed without building a value: aliases share their nodes here.
        if "*" in text and _is_larger_than(yaml.compose(text, yaml.SafeLoader), _MAX_VALUES):
            raise AtollError(f"{where}: its aliases (*NAME) describe more than {_MAX_VALUES:,} values; write them out")
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise AtollError(f"{where}: not YAML ({' '.join(str(error).split())})") from None
    except RecursionError:
        raise AtollError(f"{where}: not YAML that can be read (lists and objects are nested too deeply)") from None


def _is_larger_than(root: Any, most: int) -> bool:
    """Return whether a YAML node has more than `most` nodes below it, each counted wherever an alias repeats it."""
    waiting, count = [root], 0
    while waiting and count <= most:
        node = waiting.pop()
        count += 1
        if isinstance(node, yaml.MappingNode):
            waiting += [part for pair in node.value for part in pair]
        elif isinstance(node, yaml.SequenceNode):
            waiting += node.value
    return count > most
