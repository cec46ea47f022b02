"""One velocity evaluation of 8 experts for 16 guided prompts: grouped dispatch against the ways of public code.

    python benchmarks/ensemble.py [--size S/2] [--rounds 5] [--dtype bf16] [--json out.json]

- grouped: `Ensemble.velocity`: one call per expert in use, with both guidance branches.
- loop: sample by sample, each chosen expert called twice (condition, null).
- mask: every expert on every sample, both branches, then weighted (most weights are 0).
- grouped-again: the same with cached prompts, as in every step of a sampling but the first.
- one: a single model of an expert's size on all samples, both branches: the cost of a monolith.
- one-again: the same with cached prompts.

The variants alternate within each round; the table shows medians of their times and of the ratios within a round.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from atoll.alignment import snr_velocity
from atoll.calibration import Calibration
from atoll.condition import Condition
from atoll.ensemble import Ensemble, Expert
from atoll.nn.attention import TextKV
from atoll.nn.dit import SIZES, DiT, DiTConfig
from atoll.objective import Objective

EXPERTS, PROMPTS, TOKENS, TEXT, GUIDANCE = 8, 16, 77, 768, 7.5
LATENT = (4, 16, 16)
RATIOS = [
    *(("loop", "grouped"), ("mask", "grouped"), ("grouped", "one"), ("grouped", "grouped-again")),
    *(("grouped-again", "one"), ("grouped-again", "one-again")),
]


def build(size: str, dtype: torch.dtype) -> tuple[list[Expert], Tensor]:
    """Eight random experts, half eps-cosine and half flow, and a router output that spreads the prompts evenly."""
    experts = []
    for k in range(EXPERTS):
        config = DiTConfig(size=LATENT[1:], channels=LATENT[0], states_dim=TEXT, **SIZES[size])
        network = DiT(config).to(dtype).eval().requires_grad_(False)
        for parameter in network.parameters():
            torch.nn.init.normal_(parameter, std=0.02)
        objective = Objective("eps", "cosine") if k % 2 else Objective("flow", "linear")
        experts.append(Expert(network, objective, (k,), Calibration.identity(torch.zeros(LATENT)), str(k)))
    g = torch.Generator().manual_seed(0)
    log_p = 0.1 * torch.randn(PROMPTS, EXPERTS, generator=g)
    log_p[torch.arange(PROMPTS), torch.arange(PROMPTS) % EXPERTS] += 2.0  # two prompts per expert
    log_p[torch.arange(PROMPTS), (torch.arange(PROMPTS) * 3 + 1) % EXPERTS] += 1.0
    return experts, torch.log_softmax(log_p, dim=1)


def by_loop(ensemble: Ensemble, x: Tensor, t: Tensor, condition: Condition, null: Condition) -> Tensor:
    weights = ensemble.weights(x, t)
    rows = []
    for i in range(len(x)):
        one, at = x[i : i + 1], t[i : i + 1]
        total = torch.zeros_like(one)
        for index in weights[i].nonzero().flatten().tolist():
            expert = ensemble.experts[index]
            u_null = expert.velocity(one, at, null)
            u = u_null + GUIDANCE * (expert.velocity(one, at, condition.index(torch.tensor([i]))) - u_null)
            total = total + weights[i, index] * u
        rows.append(total)
    return torch.cat(rows)


def by_mask(ensemble: Ensemble, x: Tensor, t: Tensor, condition: Condition, null: Condition) -> Tensor:
    weights = ensemble.weights(x, t)
    both = Condition.cat([condition, null.index(torch.zeros(len(x), dtype=torch.long))])
    total = torch.zeros_like(x)
    for index, expert in enumerate(ensemble.experts):
        u_condition, u_null = expert.velocity(x.repeat(2, 1, 1, 1), t.repeat(2), both).chunk(2)
        u = u_null + GUIDANCE * (u_condition - u_null)
        total = total + weights[:, index].reshape(-1, 1, 1, 1) * u
    return total


def measure(routing: str, experts: list[Expert], log_p: Tensor, rounds: int) -> dict[str, float]:
    """Median seconds per variant, and median ratios to grouped."""
    g = torch.Generator().manual_seed(1)
    x, t = torch.randn(PROMPTS, *LATENT, generator=g), torch.full((PROMPTS,), 0.6)
    condition = Condition(torch.randn(PROMPTS, TOKENS, TEXT, generator=g), torch.ones(PROMPTS, TOKENS).bool())
    null = condition.index(torch.tensor([0]))
    ensemble = Ensemble(experts, lambda x, t, pooled=None: log_p, routing, null=(null,))
    both = Condition.cat([condition, null.index(torch.zeros(PROMPTS, dtype=torch.long))])
    first = experts[0]

    prompts = ensemble.prompt_cache((condition,))
    assert isinstance(first.network, DiT)
    read = first.network.read_prompt(both)

    def one(prompt: Condition | TextKV) -> Tensor:
        def predict(x_scaled: Tensor, time: Tensor) -> Tensor:
            return first.network(x_scaled, time, prompt)

        return snr_velocity(predict, first.objective, x.repeat(2, 1, 1, 1), t.repeat(2), first.calibration)

    variants: dict[str, Callable[[], Tensor]] = {
        "grouped": lambda: ensemble.velocity(x, t, condition, GUIDANCE),
        "loop": lambda: by_loop(ensemble, x, t, condition, null),
        "mask": lambda: by_mask(ensemble, x, t, condition, null),
        "one": lambda: one(both),
        "grouped-again": lambda: ensemble.velocity(x, t, None, GUIDANCE, prompt_cache=prompts),
        "one-again": lambda: one(read),
    }
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    with torch.inference_mode():
        answers = [
            variants[name]() for name in ("grouped", "loop", "mask", "grouped-again")
        ]  # warm-up, and all must agree
        scale = answers[0].abs().max()
        difference = max(float((answer - answers[0]).abs().max() / scale) for answer in answers[1:])
        assert difference < 0.05, f"the variants disagree by {difference}"
        for _ in range(rounds):
            for name, work in variants.items():
                start = time.perf_counter()
                work()
                seconds[name].append(time.perf_counter() - start)
    result = {name: statistics.median(times) for name, times in seconds.items()}
    for name, other in RATIOS:
        pairs = zip(seconds[name], seconds[other], strict=True)
        result[f"{name}/{other}"] = statistics.median(a / b for a, b in pairs)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="S/2", choices=SIZES)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtype", default="bf16", choices=["bf16", "fp32"])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    experts, log_p = build(arguments.size, torch.bfloat16 if arguments.dtype == "bf16" else torch.float32)
    results = {r: measure(r, experts, log_p, arguments.rounds) for r in ("top-1", "top-2", "full")}
    print(
        f"{EXPERTS} experts {arguments.size}, {PROMPTS} guided prompts, {arguments.dtype}, {arguments.threads} threads"
    )
    names = [f"{name}/{other}" for name, other in RATIOS]
    print(f"{'routing':8} {'grouped s':>10}  {'  '.join(names)}")
    for routing, r in results.items():
        print(f"{routing:8} {r['grouped']:10.2f}  {'  '.join(f'{r[name]:{len(name)}.2f}' for name in names)}")
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
