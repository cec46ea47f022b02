"""Another average of the weights, of one expert or of a whole ensemble: `atoll ema`."""

import re
import shutil
import warnings
from pathlib import Path

from atoll.encoders.trust import STRANGER, Trust
from atoll.ensemble.parts import require_contained, require_hash
from atoll.errors import AtollError
from atoll.storage.artifact import CARD, WEIGHTS, load_card, read_card, sha256_file, whole_directory, write_card
from atoll.storage.cards import EnsembleCard, ExpertCard, ExpertEntry
from atoll.storage.containment import owning_directory
from atoll.storage.layout import ENSEMBLE_CARD, ROUTER
from atoll.train.calibrate_expert import calibrate_expert, shards_of
from atoll.train.ema import gamma_of
from atoll.train.snapshots import reconstruct_expert


def reconstruct(path: Path, sigma_rel: float, out: Path, step: int | None = None, trust: Trust = STRANGER) -> str:
    """Reconstruct the expert, or all experts of the ensemble, at `path`; arguments and errors as in the other two.

    Returns:
        What was written, and what is left to do.
    """
    if (path / ENSEMBLE_CARD).is_file():
        return f"{reconstruct_ensemble(path, sigma_rel, out, step, trust)} written"
    return f"{reconstruct_expert(path, sigma_rel, out, step)} written; calibrate it with `atoll calibrate`"


def reconstruct_ensemble(
    ensemble: Path, sigma_rel: float, out: Path, step: int | None = None, trust: Trust = STRANGER
) -> Path:
    """Reconstruct all experts of an ensemble, and write the ensemble of them, with a copy of its router.

    The new experts are calibrated like the old ones, on the clusters of their run. Replicas share their weight equally.

        runs/mine/weak/ensemble.json, runs/mine/weak/router/, runs/mine/weak/3-moss/, ...

    Args:
        ensemble: its directory, in the run that trained the experts.
        sigma_rel, step: as in `reconstruct_expert`, of every expert.
        out: the directory of the new ensemble.
        trust: what the ensemble's cards may reach.

    Returns:
        `out`.

    Raises:
        AtollError: as in `reconstruct_expert`, for any expert; an expert with a low-rank update. Nothing is written
            then.
    """
    # Check the arguments and all parts before the first one is computed.
    gamma_of(sigma_rel)
    if out.exists():
        raise AtollError(f"{out}: exists already; choose another directory, or remove it")
    card = load_card(ensemble / ENSEMBLE_CARD, EnsembleCard)
    root = trust.run or owning_directory(ensemble)
    for part in (*card.experts, *([card.router] if card.router else ())):
        require_contained(ensemble / part.url, root, ensemble / ENSEMBLE_CARD, trust)
        require_hash(ensemble / part.url / CARD, part.sha256)
    if updated := [expert.name for expert in card.experts if expert.lora is not None]:
        raise AtollError(
            f"{ensemble}: {updated[0]} has a low-rank update, which has no snapshots; assemble it without --lora"
        )
    # Names become directories, and a card may come from anyone.
    names = [expert.name for expert in card.experts]
    for name in names:
        if names.count(name) > 1 or not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]*", name) or name == ROUTER:
            raise AtollError(
                f"{ensemble}: has an expert named {name!r:.60}, of which no directory can be made; reconstruct its "
                "experts one by one"
            )

    # All parts appear together, or none.
    with whole_directory(out) as directory:
        entries = []
        for expert in card.experts:
            new = reconstruct_expert(ensemble / expert.url, sigma_rel, directory / expert.name, step)
            _calibrate(new, ensemble / expert.url, trust)
            hash_of_card = sha256_file(new / CARD)
            entries.append(ExpertEntry(name=expert.name, clusters=expert.clusters, url=new.name, sha256=hash_of_card))
        changes: dict[str, object] = {"experts": tuple(entries)}
        if card.router is not None:
            # A copy, so that the new ensemble can be moved.
            (directory / ROUTER).mkdir()
            for name in (CARD, WEIGHTS):
                shutil.copyfile(ensemble / card.router.url / name, directory / ROUTER / name)
            changes["router"] = card.router.model_copy(update={"url": ROUTER})
        # The weights of replicas were measured on other experts.
        if card.stackings is not None:
            changes["stackings"] = None
        write_card(directory / ENSEMBLE_CARD, card.model_copy(update=changes))
    return out


def _calibrate(new: Path, old: Path, trust: Trust) -> None:
    """Calibrate a new expert if the old one is calibrated, or warn that it is not possible."""
    if read_card(old, ExpertCard).calibration is None:
        return
    try:
        calibrate_expert(new, shards_of(old), trust=trust)
    except AtollError as error:
        warnings.warn(f"{new.name}: written without a calibration ({error})", stacklevel=3)
