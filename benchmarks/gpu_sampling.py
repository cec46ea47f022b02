"""Sampling of an ensemble with random weights: a part of benchmarks/gpu.py.

The router is evaluated at every step, so its cost counts; its output, from random weights, is replaced by one that
spreads the prompts over the experts, two per expert at top-1 with 16 prompts and 8 experts.
"""

import statistics
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from gpu_measure import Evaluator, release, seconds_of
from gpu_training import LATENT, TEXT_TOKENS, TEXT_WIDTH, config_of, randomized
from torch import Tensor, nn

from atoll.calibration import Calibration
from atoll.condition import Condition
from atoll.ensemble import Ensemble, Expert, Sampler
from atoll.ensemble.offload import ExpertCache, bytes_of
from atoll.nn import SIZES, DiT, Router
from atoll.nn.router import RouterConfig
from atoll.objective import Objective
from atoll.schedule import Cosine, Linear
from atoll.solver import sample

EXPERT, ROUTER = "XL/2", "B/2"
EXPERTS, PROMPTS, STEPS, GUIDANCE = 8, 16, 50, 7.5
BUDGET, TINY_BUDGET = 6_000_000_000, 14_000_000  # bytes, of which the router and four experts take most


class SpreadRouter:
    """Evaluates a router's network, and returns `log_p` [B, K] instead."""

    def __init__(self, network: nn.Module, log_p: Tensor):
        self.network, self.log_p = network, log_p

    def __call__(self, x: Tensor, t: Tensor, pooled: Tensor | None = None) -> Tensor:
        self.network(x, t)
        return self.log_p[: len(x)]


def spread(prompts: int) -> Tensor:
    """log p [prompts, EXPERTS]: prompt i prefers expert i, then 3 i + 1 (modulo their number)."""
    g = torch.Generator().manual_seed(0)
    log_p, i = 0.1 * torch.randn(prompts, EXPERTS, generator=g), torch.arange(prompts)
    log_p[i, i % EXPERTS] += 2.0
    log_p[i, (3 * i + 1) % EXPERTS] += 1.0
    return log_p.log_softmax(1)


def build_ensemble(expert_size: str, router_size: str, device: torch.device) -> Ensemble:
    """Eight experts in bf16, alternating flow on the linear path and eps on the cosine schedule, and a router."""
    experts = []
    with device:
        for k in range(EXPERTS):
            network = randomized(DiT(config_of(expert_size))).bfloat16().eval().requires_grad_(False)
            objective = Objective("eps", Cosine()) if k % 2 else Objective("flow", Linear())
            experts.append(Expert(network, objective, (k,), Calibration.identity(torch.zeros(LATENT)), str(k)))
        config = RouterConfig(size=LATENT[1:], channels=LATENT[0], clusters=EXPERTS, **SIZES[router_size])
        router = randomized(Router(config)).bfloat16().eval().requires_grad_(False)
        null = prompts_of(1, device)
    return Ensemble(experts, SpreadRouter(router, spread(PROMPTS).to(device)), "top-1", null=(null,))


def prompts_of(count: int, device: torch.device) -> Condition:
    """Random text of full length."""
    states = torch.randn(count, TEXT_TOKENS, TEXT_WIDTH, device=device).bfloat16()
    return Condition(states, torch.ones(count, TEXT_TOKENS, dtype=torch.bool, device=device))


@torch.inference_mode()
def measured(ensemble: Ensemble, batch: int, steps: int, rounds: int, bench: Evaluator) -> dict[str, Any]:
    """Median seconds to sample `batch` latents; images/s; and peak memory, weights included.

    Works for any ensemble: on the device as a whole, or within a memory budget.
    """
    condition = prompts_of(batch, bench.device)
    noise = torch.randn(batch, *LATENT, device=bench.device)
    velocity = partial(Sampler(ensemble).velocity, condition=condition, guidance_scale=GUIDANCE)
    release(bench.device)
    first = seconds_of(lambda: sample(velocity, noise, steps=2), bench.device)  # loads kernels, or compiles
    drawn: list[Tensor] = []

    def draw() -> None:
        drawn[:] = [sample(velocity, noise, steps)]

    seconds = statistics.median(seconds_of(draw, bench.device) for _ in range(rounds))
    if not drawn[0].isfinite().all():
        raise RuntimeError("sampling gave NaN or infinity")
    peak = torch.cuda.max_memory_allocated() / 2**30 if bench.on_gpu else None
    rates = {"seconds": seconds, "images_per_second": batch / seconds, "first_two_steps_seconds": first}
    return {**rates, "rounds": rounds, "peak_gib": peak}


def under_budget(ensemble: Ensemble, budget: int, device: torch.device) -> Ensemble:
    """The same experts in the host's memory, loaded on demand within a budget of bytes on the device."""
    store, experts = ExpertCache(budget, device), []
    for expert in ensemble.experts:
        network = expert.network.cpu()  # type: ignore[attr-defined]
        brought = store.add(expert.name, bytes_of(network), lambda network=network: network)
        experts.append(replace(expert, network=brought))
    store.reserve(bytes_of(ensemble.router.network))  # type: ignore[union-attr]
    return replace(ensemble, experts=experts)


def ensemble_for(way: str, bench: Evaluator) -> Ensemble:
    """A new ensemble to sample in one way: "eager", "compiled" per block, or "offloaded" within a budget."""
    ensemble = build_ensemble(*(("tiny", "tiny") if bench.tiny else (EXPERT, ROUTER)), bench.device)
    if way == "compiled":
        for expert in ensemble.experts:
            for block in expert.network.blocks:  # type: ignore[attr-defined]
                block.compile()
    if way == "offloaded":
        return under_budget(ensemble, TINY_BUDGET if bench.tiny else BUDGET, bench.device)
    return ensemble


def sampling(bench: Evaluator) -> None:
    """Part "sampling": images/s at a batch of 16, and the latency of one image, for three routings.

    Eager, compiled, and with experts that do not all fit into a budget.
    """
    steps, prompts = (2, 3) if bench.tiny else (STEPS, PROMPTS)
    sizes = {"expert": "tiny", "router": "tiny"} if bench.tiny else {"expert": EXPERT, "router": ROUTER}
    about = {**sizes, "experts": EXPERTS, "steps": steps, "guidance": GUIDANCE, "weights": "bf16"}
    bench.keep("sampling", {**about, "budget_gb": (TINY_BUDGET if bench.tiny else BUDGET) / 1e9})
    cases = {("top-1", prompts): 25, ("top-2", prompts): 30, ("full", prompts): 45, ("top-1", 1): 15}  # about seconds
    ways = {"eager": 0, "compiled": 30, "offloaded": 30}  # seconds more
    for way in ways if bench.compile else ("eager", "offloaded"):
        ensemble = None
        for (routing, batch), seconds in cases.items():
            what = f"{routing}, batch {batch}, {way}"
            if (way == "offloaded" and routing != "top-1") or not bench.has_time(seconds + ways[way], "sampling", what):
                continue
            ensemble = ensemble or ensemble_for(way, bench)
            rounds = 1 if routing == "full" or bench.tiny else 3
            row = measured(replace(ensemble, routing=routing), batch, steps, rounds, bench)
            bench.keep("sampling", {what: row})
        ensemble = None
        release(bench.device)
