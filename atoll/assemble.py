"""Experts + router -> ensemble/ensemble.json, which names its parts and their hashes: `atoll assemble`."""

import os
import warnings
from pathlib import Path
from typing import Any

from atoll.artifact import CARD, FORMAT, read_card, sha256_file, write_json
from atoll.errors import AtollError
from atoll.manifest import Manifest
from atoll.weights import same

ENSEMBLE = "ensemble.json"

# What all parts of one ensemble must share to be sampled as one model.
_SHARED = ("assignment", "latent_shape", "codec")


def assemble(experts: list[Path], router: Path | None, out: Path, sampling: dict[str, Any] | None = None) -> Path:
    """Writes `out`/ensemble.json over the given artifacts (parts stay where they are, named relative to `out`).

    Args:
        experts: directories of expert artifacts, at least one.
        router: the router's directory; None where one expert is all there is.
        out: the ensemble's directory.
        sampling: defaults for the pipeline: steps, guidance_scale, method, routing.

    Raises:
        AtollError: a part is missing or of another kind, or two parts are of different data.
    """
    if not experts:
        raise AtollError("no experts to assemble; train one with `atoll train expert 0`")
    cards = {path: read_card(path, "expert") for path in experts}
    if router is not None:
        cards[router] = read_card(router, "router")
    first = experts[0]
    for path, card in cards.items():
        for key in _SHARED:
            mine, theirs = card.get(key), cards[first].get(key)
            if not same(mine, theirs):
                raise AtollError(
                    f"{path}: its {key} is {mine}, that of {first} is {theirs}; "
                    "parts of one ensemble must come from the same clusters"
                )
    out.mkdir(parents=True, exist_ok=True)
    write_json(
        out / ENSEMBLE,
        {
            "format": FORMAT,
            "kind": "ensemble",
            "experts": [_entry(path, cards[path], out) for path in experts],
            "router": None if router is None else _entry(router, cards[router], out),
            "clusters": cards[first]["k"],
            **{key: cards[first][key] for key in _SHARED},
            "sampling": sampling or {},
        },
    )
    return out


def assemble_run(run: Path, manifest: Manifest) -> Path:
    """Assembles the experts that the manifest names and that are trained, with the run's router.

    Experts that are not there yet are told about in a warning, and the ensemble is made without them.
    """
    named = [run / "experts" / expert.full_name for expert in manifest.experts]
    trained = [path for path in named if (path / CARD).is_file()]
    if missing := [path.name for path in named if path not in trained]:
        warnings.warn(f"not trained yet, left out: {', '.join(missing)}", stacklevel=2)
    router = run / "router"
    alone = len(trained) == 1 and not (router / CARD).is_file()
    return assemble(trained, None if alone else router, run / "ensemble", manifest.sampling.model_dump())


def _entry(path: Path, card: dict[str, Any], out: Path) -> dict[str, Any]:
    """One part: where it is, and the hash of its card (which holds that of its weights)."""
    entry = {"url": Path(os.path.relpath(path, out)).as_posix(), "sha256": sha256_file(path / CARD)}
    return entry if "name" not in card else {"name": card["name"], "clusters": card["clusters"], **entry}
