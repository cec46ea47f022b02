"""All checks of one expert, cheapest first; what comes after a failed one is not computed."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from atoll.collective.gate.captioned import MAX_CAPTIONS, CaptionedDenoiser, exchanged
from atoll.collective.gate.check import Check, quantile
from atoll.collective.gate.checks import (
    BANDS,
    PROMPT_LEVELS,
    card_errors,
    check_captions,
    check_card,
    check_error,
    check_others,
    check_prompt,
    check_single,
    claimed_errors,
    random_velocity,
    tolerance,
)
from atoll.collective.gate.contents import check_contents
from atoll.collective.gate.errors import Draws, expert_velocity, linear_velocity
from atoll.collective.gate.linear import MAX_ROWS, LinearDenoiser
from atoll.collective.gate.probe import EDGES, Noisy, Probe, ProbeRows
from atoll.condition import Condition
from atoll.encoders.codec.statistics import refuse_other_statistics
from atoll.encoders.text import TextEncoder
from atoll.ensemble.loading import LoadedExpert
from atoll.errors import AtollError, escaped
from atoll.randomness import Stream, cpu_generator, hashed_seed, random_rows, seeded
from atoll.storage.cards import ClusterShardsCard, Lineage
from atoll.storage.memory import is_out_of_memory
from atoll.storage.shards import LATENTS, Shards, is_held_out

PROBE_ROWS = 64
OTHER_ROWS = 256  # of all other clusters, for their linear denoiser
_CLAIMED = 256  # noisy latents per node, and rows at most, of a card's curve: see `atoll.train.calibrate`
_CARD_ROWS = 24


@dataclass(frozen=True, eq=False)
class ClusterReference:
    """What the experts of some clusters are compared with; the same for all of them.

    Attributes:
        clusters: the clusters.
        probe: secret rows of all clusters.
        shards: the collective's shards of these clusters.
        encoder: of captions.
        lineage: the collective's assignment, with the older ones that it grew from; None: that of the shards alone.
    """

    clusters: tuple[int, ...]
    probe: Probe
    shards: tuple[Shards, ...]
    encoder: TextEncoder
    lineage: Lineage | None = None

    @property
    def descent(self) -> Lineage:
        """The collective's assignment, with the older ones that it grew from."""
        return self.lineage or self.data.descent

    @property
    def data(self) -> ClusterShardsCard:
        """The card of the collective's shards."""
        return self.shards[0].card(ClusterShardsCard)

    @cached_property
    def _training(self) -> ProbeRows:
        parts = []
        for number, shards in zip(self.clusters, self.shards, strict=True):
            rows = shards.rows("train", LATENTS[0])
            # A fixed choice: the same reference for every candidate and every admitter.
            chosen = rows[random_rows(len(rows), MAX_ROWS // len(self.shards), cpu_generator(number)).sort().values]
            parts.append(ProbeRows(shards.read("latent", chosen).float(), tuple(shards.captions_of(chosen))))
        return ProbeRows.cat(parts)

    @property
    def training(self) -> Tensor:
        """Random training latents [n, ...], as many as a covariance needs."""
        return self._training.latents

    @cached_property
    def own(self) -> LinearDenoiser:
        """The linear denoiser of these clusters."""
        return LinearDenoiser.of(self.training)

    @cached_property
    def captioned(self) -> CaptionedDenoiser:
        """The linear denoiser of these clusters that reads captions."""
        # The rows are sorted; those of the regression are drawn among them.
        rows = random_rows(len(self.training), MAX_CAPTIONS, cpu_generator(len(self.clusters)))
        some = self._training.select(rows)
        return CaptionedDenoiser.of(some.latents, some.captions, self.encoder)

    def others(self, count: int, seed: int) -> ProbeRows | None:
        """Secret rows of the other clusters; None if there is none."""
        others = [number for number in range(self.probe.lineage.k) if number not in self.clusters]
        return self.probe.rows(others, count, seed) if self.probe.has(others) else None

    def claimed_rows(self, holdout: float, seed: int) -> Tensor:
        """The numbers [n] of the rows that a card's curve was measured on, counted through the shards."""
        held_out = is_held_out(self.shards, holdout).nonzero().flatten()
        # The choice of `atoll.train`: random rows by the training's seed, sorted. Those of another size than the main
        # one are left out: the linear denoisers know that alone.
        chosen = held_out[random_rows(len(held_out), _CLAIMED, seeded(seed, 0, Stream.SUBSET)).sort().values]
        return chosen[torch.cat([shards.has_main_shape(LATENTS[0]) for shards in self.shards])[chosen]]

    def latents(self, numbers: Tensor) -> ProbeRows:
        """Read rows [n] of the shards, counted through all of them."""
        parts, start = [], 0
        for shards in self.shards:
            inside = numbers[(numbers >= start) & (numbers < start + len(shards))] - start
            if len(inside):
                parts.append(ProbeRows(shards.read("latent", inside).float(), tuple(shards.captions_of(inside))))
            start += len(shards)
        return ProbeRows.cat(parts)


def judge(
    path: Path,
    reference: ClusterReference,
    *,
    name: str,
    seed: int,
    clusters: tuple[int, ...] | None = None,
    known: Mapping[str, str] | None = None,
    rows: int = PROBE_ROWS,
    device: torch.device | str = "cpu",
    thorough: bool = False,
) -> list[Check]:
    """Run the checks on one expert.

    Args:
        path: its directory.
        reference: of what its clusters are now.
        name: its name in the submission.
        seed: of rows and noise; nobody knows it before.
        clusters: its clusters in the submission, by the assignment that it was trained on; None: the reference's.
        known: as in `check_contents`.
        rows: secret rows of its clusters.
        device: where it is evaluated.
        thorough: go on after a failed check, except where the expert cannot be evaluated.

    Returns:
        The results, in order; the last one failed, or all passed.
    """
    # Secret rows of other statistics would be noise to an honest expert.
    refuse_other_statistics(reference.probe.directory, reference.probe.codec, "the collective", reference.data.codec)
    check, loaded = check_contents(
        path,
        reference.data,
        reference.descent,
        name=name,
        clusters=clusters or reference.clusters,
        now=reference.clusters,
        known=known or {},
        device=device,
    )
    results = [check]
    if loaded is None:
        return results
    trial = _Trial(loaded, reference, seed, rows, device)
    if problem := trial.broken():
        return [Check("contents", 1.0, 0.0, False, problem)]
    for step in (trial.card, trial.null, trial.others, trial.error, trial.prompt, trial.captions):
        results += step()
        if not thorough and not all(one.passed for one in results):
            break
    return results


class _Trial:
    """One expert on one draw of rows and noise."""

    def __init__(
        self, loaded: LoadedExpert, reference: ClusterReference, seed: int, rows: int, device: torch.device | str
    ):
        self.expert, self.about, self.reference = loaded.expert, loaded.card, reference
        self.seed, self.device = seed, device
        self.rows = reference.probe.rows(reference.clusters, rows, seed)
        others = reference.others(OTHER_ROWS, seed)
        self.other_rows = others
        self.other = LinearDenoiser.of(others.latents) if others else None

    def broken(self) -> str:
        """Why the network cannot be evaluated, "" if it can: types that do not fit each other show only then."""
        row, t = self.rows.select(torch.arange(1)), torch.tensor([0.5])
        try:
            expert_velocity(self.expert, self._encode(row.captions), self.device)(Noisy(row.latents, row.latents, t))
        except AtollError as error:
            reason = str(error)
        except (RuntimeError, TypeError, ValueError) as error:
            # These are no fault of the expert, and a report stays.
            if is_out_of_memory(error) or isinstance(error, getattr(torch, "AcceleratorError", ())):  # torch 2.8
                raise
            reason = str(error)
        else:
            return ""
        return f"its network cannot be evaluated ({escaped(' '.join(reason.split())[:200])})"

    def card(self) -> list[Check]:
        """The card's curve on the rows that it was measured on; nothing if these are unknown."""
        training, record = self.about.training, self.about.calibration
        if training is None or record is None or record.measured_on != "held back" or self.expert.calibration is None:
            return []
        numbers = self.reference.claimed_rows(training.calibration_holdout, training.seed)
        some = random_rows(len(numbers), _CARD_ROWS, cpu_generator(hashed_seed("card", self.seed)))
        chosen = numbers[some.sort().values]
        if len(chosen) < 2:
            return []
        rows, linear = self.reference.latents(chosen), linear_velocity(self.reference.own)
        velocity = expert_velocity(self.expert, self._encode(rows.captions * 2), self.device)
        errors, same = (card_errors(one, rows.latents, self.seed) for one in (velocity, linear))
        all_linear = card_errors(linear, self.reference.latents(numbers).latents, self.seed)
        return [check_card(errors, same, all_linear, claimed_errors(self.expert.calibration), _CLAIMED)]

    def null(self) -> list[Check]:
        """The empty prompt, which guidance needs."""
        draws = Draws.of(self.rows.latents, BANDS, self.reference.own, self.seed, first=100)
        errors = draws.errors(expert_velocity(self.expert, self._encode([""] * len(self.rows)), self.device))
        return [check_error(errors, self._allowed(draws), BANDS, "null")]

    def others(self) -> list[Check]:
        """Rows of other clusters; nothing if there are none."""
        if self.other_rows is None:
            return []
        some = random_rows(len(self.other_rows), len(self.rows) // 2, cpu_generator(hashed_seed("others", self.seed)))
        rows = self.other_rows.select(some)
        draws = Draws.of(rows.latents, BANDS, self.reference.own, self.seed, first=200)
        velocity = expert_velocity(self.expert, self._encode(rows.captions), self.device)
        blind = random_velocity(self.reference.training, self.seed)
        return [check_others(draws.errors(velocity), draws.errors(blind), BANDS)]

    def error(self) -> list[Check]:
        """All noise levels of its own cluster."""
        self.draws = Draws.of(self.rows.latents, EDGES, self.reference.own, self.seed)
        velocity = expert_velocity(self.expert, self._encode(self.rows.captions), self.device)
        self.errors = self.draws.errors(velocity)
        self.allowed = self._allowed(self.draws)
        return [check_error(self.errors, self.allowed, EDGES)]

    def prompt(self) -> list[Check]:
        """Each other's captions at some of these levels, with the same noise; nothing if captions say nothing."""
        linear, captions = self.reference.captioned, exchanged(self.rows.captions)
        # Of rows that the regression left out: what it gains on the few rows of the probe would prove little.
        if linear.worse > -quantile(1, linear.rows):
            return []
        levels = list(PROMPT_LEVELS)
        draws = self.draws.select(levels)
        return [
            check_prompt(
                self.errors[levels],
                draws.errors(expert_velocity(self.expert, self._encode(captions), self.device)),
                draws.errors(linear.velocity(self.rows.captions)),
                draws.errors(linear.velocity(captions)),
            )
        ]

    def captions(self) -> list[Check]:
        """Single captions and single rows, from the errors that are known already."""
        return [check_captions(self.errors, self.allowed), check_single(self.errors, self.allowed, EDGES)]

    def _allowed(self, draws: Draws) -> Tensor:
        return tolerance(draws, self.reference.own, self.other, self.expert.objective.prediction)

    def _encode(self, captions: Sequence[str]) -> Condition:
        return self.reference.encoder(list(captions))
