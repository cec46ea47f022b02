"""What the trainings of atoll.yaml need of the encoded data, asked before anything is spent."""

from typing import Any

from atoll.errors import AtollError
from atoll.manifest.run import Manifest
from atoll.storage.layout import COMMON, GENERALIST, MONOLITH, STUDENT


def check_stored(manifest: Manifest) -> None:
    """Raise AtollError if a training of the run predicts targets that encoding does not store.

    Encoding and plans ask, so that it is not found when hours are spent. A training itself asks its shards, which may
    be another run's.
    """
    if manifest.targets.feature is not None:
        return
    parts: dict[str, Any] = {f"expert {expert.full_name}": expert for expert in manifest.experts}
    parts |= {name: getattr(manifest, name) for name in (COMMON, GENERALIST, MONOLITH, STUDENT)}
    for name, part in parts.items():
        if part is not None and (weight := manifest.train_of(part).targets_weight):
            raise AtollError(
                f"{name}: train.targets_weight is {weight:g}, but encoding stores no targets; set targets.feature in "
                "atoll.yaml, or train.targets_weight: 0"
            )
