"""What is sampled: an ensemble's or an expert's directory, with the options under which it is loaded."""

from dataclasses import dataclass
from pathlib import Path

from atoll.ensemble import Alignment
from atoll.ensemble.loading import Fetch
from atoll.ensemble.offload import WeightDtype
from atoll.pipeline import Pipeline
from atoll.storage.artifact import sha256_file
from atoll.storage.layout import CARD, ENSEMBLE, ENSEMBLE_CARD


@dataclass(frozen=True, kw_only=True)
class ModelSource:
    """What is sampled, and how it is loaded; arguments as in `Pipeline.from_pretrained`.

    Attributes:
        path: the directory of an ensemble or an expert.
        name: for the images' settings; None: the directory's, or the run's.
    """

    path: Path
    name: str | None = None
    routing: str | None = None
    alignment: Alignment = "snr"
    strict: bool = False
    replicas: str | None = None
    memory_budget: str | None = None
    weights: WeightDtype | None = None
    allow_hub: bool = False
    trust_paths: bool = False
    fetch: Fetch | None = None
    weak: Path | None = None

    def load(self) -> Pipeline:
        """Load it. Raises AtollError as `load_ensemble` does."""
        return Pipeline.from_pretrained(
            self.path,
            self.routing,
            self.alignment,
            self.strict,
            replicas=self.replicas,
            memory_budget=self.memory_budget,
            weights=self.weights,
            allow_hub=self.allow_hub,
            trust_paths=self.trust_paths,
            fetch=self.fetch,
            weak=self.weak,
        )

    def shown_name(self) -> str:
        """Return the name for the images' settings."""
        return _name_of(self.path) if self.name is None else self.name

    def sha256(self) -> str:
        """Return the hash of the ensemble's or the expert's card."""
        return _sha256_of(self.path)

    def weak_settings(self) -> dict[str, str]:
        """Return the name of the weak ensemble and its card's hash, for the images' settings; nothing without one."""
        return {} if self.weak is None else {"weak": _name_of(self.weak), "weak_sha256": _sha256_of(self.weak)}


def _name_of(path: Path) -> str:
    # Of RUN/ensemble, the run's name says more.
    path = path.resolve()
    return (path.parent.name if path.name == ENSEMBLE else path.name) or path.name or "root"


def _sha256_of(path: Path) -> str:
    file = path / ENSEMBLE_CARD
    return sha256_file(file if file.is_file() else path / CARD)
