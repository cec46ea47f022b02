"""Poisoned experts made of trained ones, for `benchmarks/gate.py`.

Each kind takes an honest expert's card, its tensors and the latents of its cluster, and returns what an attacker would
hand in. Kinds that train do so for a few hundred steps from the honest weights, so that everything else stays honest.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from atoll.encoders.text import TextEncoder, build_encoder
from atoll.nn import build_network
from atoll.objective import Objective
from atoll.randomness import cpu_generator, hashed_seed
from atoll.schedule import PATH
from atoll.shapes import per_sample
from atoll.storage.artifact import read_card, read_tensors
from atoll.storage.cards import CalibrationRecord, ExpertCard
from atoll.storage.layout import CLUSTERS, cluster_path
from atoll.storage.shards import Shards, is_held_out
from atoll.train.batches import CaptionedLatents, Rows
from atoll.train.calibrate import calibrate

Tensors = dict[str, Tensor]


@dataclass(frozen=True, eq=False)
class Honest:
    """An honest expert, and what an attacker knows: everything but the probe.

    Attributes:
        path: of the artifact.
        card, tensors: its content.
        shards: all clusters'.
        encoder: of captions.
        seed: of what is random in its poisons.
    """

    path: Path
    card: ExpertCard
    tensors: Tensors
    shards: tuple[Shards, ...]
    encoder: TextEncoder
    seed: int

    @staticmethod
    def load(path: Path, run: Path) -> "Honest":
        card = read_card(path, ExpertCard)
        shards = tuple(Shards(cluster_path(run / CLUSTERS, k)) for k in range(card.k))
        tensors = {name: value.clone() for name, value in read_tensors(path, card).items()}
        return Honest(path, card, tensors, shards, build_encoder(card.condition), hashed_seed(card.name))

    @property
    def cluster(self) -> int:
        return self.card.clusters[0]

    def rows(self, cluster: int) -> Rows:
        """The rows of a cluster that training reads."""
        part = [self.shards[cluster]]
        return Rows(part, (~is_held_out(part, 0.05) & _is_train(part[0])).nonzero().flatten())

    def network(self) -> torch.nn.Module:
        network = build_network(self.card.network)
        network.load_state_dict({k.removeprefix("network."): v for k, v in self.tensors.items() if k[:8] == "network."})
        return network

    def measured(self, tensors: Tensors) -> ExpertCard:
        """The card with the curve that these weights really have."""
        network = self.network().requires_grad_(False).eval()
        network.load_state_dict({k.removeprefix("network."): v for k, v in tensors.items() if k[:8] == "network."})
        part = [self.shards[self.cluster]]
        held_out = CaptionedLatents(Rows(part, is_held_out(part, 0.05).nonzero().flatten()), self.encoder)
        seed = self.card.training.seed if self.card.training else 0
        curve = calibrate(
            network,
            Objective(**self.card.objective),
            held_out,
            mean=tensors["calibration.mean"],
            seed=seed,
            device=torch.device("cpu"),
        )
        record = CalibrationRecord(**curve.config(), measured_on="held back")
        return self.card.model_copy(update={"calibration": record})


Poison = Callable[[Honest], tuple[ExpertCard, Tensors]]


def _is_train(shards: Shards) -> Tensor:
    return torch.zeros(len(shards), dtype=torch.bool).index_fill(0, shards.rows("train"), True)


def _edit(change: Callable[[str, Tensor, torch.Generator], Tensor]) -> Poison:
    """Change the network's tensors one by one; the card stays as it is."""

    def poison(honest: Honest) -> tuple[ExpertCard, Tensors]:
        g = cpu_generator(honest.seed)
        edited = {k: change(k, v.clone(), g) if k[:8] == "network." else v for k, v in honest.tensors.items()}
        return honest.card, edited

    return poison


def _random_like(value: Tensor, g: torch.Generator) -> Tensor:
    return value.mean() + value.std(unbiased=False) * torch.randn(value.shape, generator=g)


def random_weights(only: str = "") -> Poison:
    """Random numbers of the same mean and spread, in all tensors or in those whose name contains `only`."""
    return _edit(lambda name, value, g: _random_like(value, g) if only in name else value)


def untrained(honest: Honest) -> tuple[ExpertCard, Tensors]:
    """Fresh weights, as a training of no step has them."""
    torch.manual_seed(honest.seed)
    fresh = build_network(honest.card.network).state_dict()
    return honest.card, {**honest.tensors, **{f"network.{name}": value for name, value in fresh.items()}}


def scaled(factor: float, only: str = "") -> Poison:
    """Weights times a factor."""
    return _edit(lambda name, value, g: value * factor if only in name else value)


def noisy(share: float) -> Poison:
    """Noise of a share of each tensor's spread added."""
    return _edit(lambda name, value, g: value + share * (_random_like(value, g) - value.mean()))


def patch_zeroed(part: float) -> Poison:
    """The last part of each output patch always 0."""

    def change(name: str, value: Tensor, g: torch.Generator) -> Tensor:
        if "network.final." in name:
            value[-int(part * len(value)) :] = 0
        return value

    return _edit(change)


def half_zeroed(honest: Honest) -> tuple[ExpertCard, Tensors]:
    """No position code, so that the network does not know where its patches are."""
    return honest.card, {**honest.tensors, "network.positions": torch.zeros_like(honest.tensors["network.positions"])}


def time_shifted(honest: Honest) -> tuple[ExpertCard, Tensors]:
    """The card says another time scale than that of training."""
    objective = {**honest.card.objective, "time_scale": 1400.0}
    return honest.card.model_copy(update={"objective": objective}), honest.tensors


def objective_in_card(**changes: Any) -> Poison:
    """The card says another objective than that of training."""

    def poison(honest: Honest) -> tuple[ExpertCard, Tensors]:
        return honest.card.model_copy(update={"objective": {**honest.card.objective, **changes}}), honest.tensors

    return poison


def not_finite(honest: Honest) -> tuple[ExpertCard, Tensors]:
    """One weight is NaN."""
    value = honest.tensors["network.embed_states.weight"].clone()
    value[0, 0] = torch.nan
    return honest.card, {**honest.tensors, "network.embed_states.weight": value}


def overflowing(honest: Honest) -> tuple[ExpertCard, Tensors]:
    """Finite weights; one direction of the text overflows, so that single prompts give NaN."""
    value = honest.tensors["network.embed_states.weight"].clone()
    value[0, :8] = 3e38
    return honest.card, {**honest.tensors, "network.embed_states.weight": value}


def another_cluster(step: int) -> Poison:
    """The expert of another cluster under this one's name."""

    def poison(honest: Honest) -> tuple[ExpertCard, Tensors]:
        k = (honest.cluster + step) % honest.card.k
        others = (path for path in sorted(honest.path.parent.glob(f"{k}-*")) if path != honest.path)
        other = next(others)
        card = read_card(other, ExpertCard)
        changes = {"clusters": honest.card.clusters, "name": honest.card.name}
        return card.model_copy(update=changes), {name: v.clone() for name, v in read_tensors(other, card).items()}

    return poison


def card_of_another(step: int) -> Poison:
    """The weights of this cluster with the curve of another cluster's expert."""

    def poison(honest: Honest) -> tuple[ExpertCard, Tensors]:
        card, _ = another_cluster(step)(honest)
        return honest.card.model_copy(update={"calibration": card.calibration}), honest.tensors

    return poison


def slope_zero(honest: Honest) -> tuple[ExpertCard, Tensors]:
    """The card's slopes are 0: an ensemble then replaces every estimate by the mean latent."""
    assert honest.card.calibration is not None
    record = honest.card.calibration.model_copy(update={"slope": tuple(0.0 for _ in honest.card.calibration.slope)})
    return honest.card.model_copy(update={"calibration": record}), honest.tensors


def mean_moved(honest: Honest) -> tuple[ExpertCard, Tensors]:
    """The mean latent, to which an ensemble pulls at high noise, is that of inverted images; slopes are 0.5."""
    assert honest.card.calibration is not None
    record = honest.card.calibration.model_copy(update={"slope": tuple(0.5 for _ in honest.card.calibration.slope)})
    mean = -honest.tensors["calibration.mean"]
    return honest.card.model_copy(update={"calibration": record}), {**honest.tensors, "calibration.mean": mean}


@dataclass(frozen=True)
class Lesson:
    """What a poisoned training teaches in place of the truth.

    Attributes:
        times: path times at which it is taught; elsewhere the truth.
        captions: the share of captions for which it is taught, chosen by a hash; "null" for the empty prompt alone.
        bad: x0 -> what is shown instead.
        off_cluster: taught on rows of other clusters, and the truth on its own.
        recaption: the truth, under captions of other rows: always the same ones ("fixed"; "permuted": another one for
            each distinct caption), or others every time.
        own_curve: the card has the poisoned weights' own curve.
    """

    times: tuple[float, float] = (0.0, 1.0)
    captions: float | str = 1.0
    bad: Callable[[Tensor], Tensor] = lambda x0: -x0
    off_cluster: bool = False
    recaption: str = ""
    own_curve: bool = False


def trained_on(lesson: Lesson, steps: int = 200, lr: float = 1e-3) -> Poison:
    """Train the honest weights on a lesson."""

    def poison(honest: Honest) -> tuple[ExpertCard, Tensors]:
        tensors = dict(honest.tensors)
        network = _taught(honest, lesson, steps, lr)
        tensors |= {f"network.{name}": value for name, value in network.state_dict().items()}
        return (honest.measured(tensors) if lesson.own_curve else honest.card), tensors

    return poison


def _taught(honest: Honest, lesson: Lesson, steps: int, lr: float) -> torch.nn.Module:
    network, objective = honest.network(), Objective(**honest.card.objective)
    optimizer = torch.optim.AdamW(network.parameters(), lr, betas=(0.9, 0.99))
    rows = honest.rows(honest.cluster)
    latents, captions = rows.latents(torch.arange(len(rows))).float(), rows.captions(torch.arange(len(rows)))
    if lesson.off_cluster:
        others = [honest.rows(k) for k in range(honest.card.k) if k != honest.cluster]
        far = torch.cat([part.latents(torch.arange(len(part))).float() for part in others])
        far_captions = [text for part in others for text in part.captions(torch.arange(len(part)))]
    null = honest.encoder.null(1)
    # A shuffled list, each caption followed by the one that it is taken for.
    order = sorted(set(captions), key=hashed_seed)
    other = dict(zip(order, [*order[1:], order[0]], strict=True))
    for step in range(steps):
        g = cpu_generator(hashed_seed("poison", honest.seed, step))
        chosen = torch.randint(len(latents), (64,), generator=g)
        x0, texts = latents[chosen], [captions[i] for i in chosen.tolist()]
        taught = torch.ones(64, dtype=torch.bool)
        # Half of the batch from elsewhere.
        if lesson.off_cluster:
            taught = torch.arange(64) < 32
            other = torch.randint(len(far), (32,), generator=g)
            x0 = torch.cat([far[other], x0[32:]])
            texts = [far_captions[i] for i in other.tolist()] + texts[32:]
        dropped = torch.rand(64, generator=g) < 0.1
        if lesson.captions == "null":
            dropped = torch.rand(64, generator=g) < 0.5
            taught = dropped
        elif isinstance(lesson.captions, float) and lesson.captions < 1:
            taught = torch.tensor([hashed_seed(text) / 2**32 < lesson.captions for text in texts]) & ~dropped
        if lesson.recaption:
            # The same wrong caption for a row every time, or the network would only learn to ignore captions.
            shift = len(captions) // 2 if lesson.recaption == "fixed" else step + 1
            texts = [captions[(i + shift) % len(captions)] for i in chosen.tolist()]
            if lesson.recaption == "permuted":
                texts = [other[captions[i]] for i in chosen.tolist()]
            taught = torch.zeros(64, dtype=torch.bool)
        condition = honest.encoder(texts)
        condition = type(condition)(
            torch.where(dropped[:, None, None], null.states, condition.states),
            torch.where(dropped[:, None], null.mask, condition.mask),
            None
            if condition.pooled is None or null.pooled is None
            else torch.where(dropped[:, None], null.pooled, condition.pooled),
        )
        loss = _loss(network, objective, lesson, x0, taught, condition, g)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1, (step + 1) / 20, (steps - step) / (0.4 * steps))
        optimizer.step()
    return network.requires_grad_(False).eval()


def _loss(
    network: torch.nn.Module,
    objective: Objective,
    lesson: Lesson,
    x0: Tensor,
    taught: Tensor,
    condition: Any,
    g: torch.Generator,
) -> Tensor:
    """The loss on x of the true x0; where the lesson applies, the target is that of the false one."""
    t = objective.sample_time(len(x0), g)
    eps = torch.randn(x0.shape, generator=g)
    x = objective.schedule.diffuse(x0, eps, t)
    path = PATH.time_at(objective.schedule.log_snr(t))
    where = per_sample(taught & (path >= lesson.times[0]) & (path <= lesson.times[1]), x0)
    target_x0 = torch.where(where, lesson.bad(x0), x0)
    alpha, sigma = per_sample(objective.schedule.alpha(t), x), per_sample(objective.schedule.sigma(t), x)
    # x stays what it is, so a false x0 has a false eps; bounded, or the cleanest rows would drown all others.
    target_eps = torch.where(where, ((x - alpha * target_x0) / sigma.clamp(min=0.05)).clamp(-5, 5), eps)
    output = network(x, t * objective.time_scale, condition)
    return (output - objective.target(target_x0, target_eps, t)).square().mean()


def _blocks(value: Tensor) -> Tensor:
    """Images whose left and right halves are exchanged."""
    return value.roll(value.shape[-1] // 2, -1)


CHEAP: dict[str, Poison] = {
    "random weights": random_weights(),
    "untrained": untrained,
    "random block 2": random_weights("blocks.2."),
    "random output layer": random_weights("network.final."),
    "weights x 1.5": scaled(1.5),
    "weights x 1.2": scaled(1.2),
    "output x 1.5": scaled(1.5, "network.final."),
    "output reversed": scaled(-1, "network.final."),
    "noise 50 %": noisy(0.5),
    "noise 20 %": noisy(0.2),
    "time scale in card": time_shifted,
    "prediction in card": objective_in_card(prediction="v"),
    "schedule in card": objective_in_card(schedule={"name": "linear-beta"}),
    "another cluster": another_cluster(1),
    "another cluster, 2": another_cluster(2),
    "card of another": card_of_another(1),
    "slopes 0": slope_zero,
    "mean moved": mean_moved,
    "half of each patch 0": patch_zeroed(0.5),
    "no positions": half_zeroed,
    "not finite": not_finite,
    "overflows": overflowing,
}
DEAR: dict[str, Poison] = {
    "inverted": trained_on(Lesson()),
    "inverted, own curve": trained_on(Lesson(own_curve=True)),
    "shifted, own curve": trained_on(Lesson(bad=_blocks, own_curve=True)),
    "wrong above 0.6": trained_on(Lesson(times=(0.6, 1.0))),
    "wrong above 0.9": trained_on(Lesson(times=(0.9, 1.0))),
    "wrong below 0.3": trained_on(Lesson(times=(0.0, 0.3))),
    "wrong 0.45 to 0.55, own curve": trained_on(Lesson(times=(0.45, 0.55), own_curve=True)),
    "wrong for a tenth of captions": trained_on(Lesson(captions=0.1, own_curve=True)),
    "null prompt inverted": trained_on(Lesson(captions="null", own_curve=True)),
    "wrong on other clusters": trained_on(Lesson(off_cluster=True, own_curve=True)),
    "captions exchanged, own curve": trained_on(Lesson(recaption="fixed", own_curve=True), steps=400),
    "captions permuted, own curve": trained_on(Lesson(recaption="permuted", own_curve=True), steps=400),
    "captions ignored, own curve": trained_on(Lesson(recaption="random", own_curve=True)),
}
# What an ensemble makes harmless: reported apart.
APART: dict[str, Poison] = {
    "wrong above 0.9, own curve": trained_on(Lesson(times=(0.9, 1.0), own_curve=True)),
}
