"""What the trainings of atoll.yaml need of the encoded data, checked before anything is spent."""

from atoll.errors import AtollError
from atoll.manifest.run import Manifest


def check_stored(manifest: Manifest) -> None:
    """Raise AtollError if a training of the run predicts targets that encoding does not store.

    For encoding and plans. A training itself checks its shards, which may be another run's.
    """
    if manifest.targets.feature is not None:
        return
    for name, part in manifest.denoisers.items():
        if weight := manifest.train_of(part).targets_weight:
            raise AtollError(
                f"{name}: train.targets_weight is {weight:g}, but encoding stores no targets; set targets.feature in "
                "atoll.yaml, or train.targets_weight: 0"
            )
