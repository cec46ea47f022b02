"""What the configs of frozen networks may reach: those in atoll.yaml are the user's, those in cards a stranger's."""

from dataclasses import dataclass
from pathlib import Path

ALLOW_HUB = "--allow-hub (allow_hub=True)"  # how a user allows cards to fetch weights


@dataclass(frozen=True)
class Trust:
    """What a config may reach.

    A card without any trust finds its weights beside it, in $ATOLL_WEIGHTS, or in the hub's cache on this machine; its
    sha256 must match.

    Attributes:
        own: the user wrote the config: paths, `~`, `$VAR` and the hub are allowed, and a sha256 is optional.
        hub: a card may fetch weights from the hub, at the revision and with the sha256 that it states.
        paths: a card may name local paths outside its directory.
        named: the `weights` that the user wrote in atoll.yaml; a card that names the same ones may use them.
        run: the run that the user named. An ensemble's parts may be anywhere in it, also through links, which the user
            placed there. None: the ensemble was named by its path.
    """

    own: bool = False
    hub: bool = False
    paths: bool = False
    named: frozenset[str] = frozenset()
    run: Path | None = None

    def owns(self, weights: str) -> bool:
        """Return whether the user named these weights."""
        # A card of the user's own run repeats what atoll.yaml says.
        return self.own or weights in self.named


USER = Trust(own=True)  # for configs from atoll.yaml, the command line and scripts
STRANGER = Trust()  # for configs from cards
