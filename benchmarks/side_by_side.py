"""Experts one after the other on all threads, against several at a time, each on threads of its own.

    python benchmarks/side_by_side.py [--rounds 5] [--sizes S/2 B/2] [--latents 8 16 32] [--rows 1 4 16]

Random experts in bf16, no guidance, prompts in the cache. Both ways in turn, medians over the rounds, and the range of
the ratios: below 1, several at a time are faster. The border is `MAX_NUMBERS` of `atoll.ensemble.side_by_side`, in
numbers of x per expert.
"""

import argparse
import statistics
import time

import torch

from atoll.condition import Condition
from atoll.ensemble import Ensemble, Expert, side_by_side
from atoll.nn.dit import SIZES, DiT, DiTConfig
from atoll.objective import Objective


def ensemble(size: str, latents: int, experts: int) -> Ensemble:
    """Experts of this size on 4 x latents x latents, and their prompts of 16 x 64; every image has its own expert."""
    config = DiTConfig(**SIZES[size], channels=4, size=(latents, latents), states_dim=64)
    networks = [DiT(config).eval().to(torch.bfloat16) for _ in range(experts)]
    return Ensemble(
        [Expert(one, Objective("flow", "linear"), (k,)) for k, one in enumerate(networks)], None, routing="oracle"
    )


@torch.inference_mode()
def measure(size: str, latents: int, experts: int, rows: int, rounds: int) -> tuple[float, list[float]]:
    """Return the median seconds one after the other, and each round's ratio of several at a time to it."""
    made = ensemble(size, latents, experts)
    count = experts * rows
    cache = made.prompt_cache((Condition(torch.randn(count, 16, 64), torch.ones(count, 16, dtype=torch.bool)),))
    x, t, cluster = torch.randn(count, 4, latents, latents), torch.full((count,), 0.5), torch.arange(count) % experts

    def seconds(border: int) -> float:
        side_by_side.MAX_NUMBERS = border
        start = time.perf_counter()
        made.velocity(x, t, cluster=cluster, prompt_cache=cache)
        return time.perf_counter() - start

    seconds(0), seconds(1 << 40)  # fill the cache, start the threads
    pairs = [(seconds(0), seconds(1 << 40)) for _ in range(rounds)]
    return statistics.median(one for one, _ in pairs), [both / one for one, both in pairs]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--sizes", nargs="+", default=["S/2", "B/2"])
    parser.add_argument("--latents", nargs="+", type=int, default=[8, 16, 32])
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 2, 4, 8, 16])
    parser.add_argument("--experts", nargs="+", type=int, default=[2, 8])
    args = parser.parse_args()
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}")
    print(f"{'size':>6} {'latent':>8} {'experts':>8} {'rows':>5} {'numbers':>8} {'s':>8} {'ratio':>6}  range")
    for size in args.sizes:
        for latents in args.latents:
            for experts in args.experts:
                for rows in args.rows:
                    one, ratios = measure(size, latents, experts, rows, args.rounds)
                    numbers, ratio = rows * 4 * latents**2, statistics.median(ratios)
                    shape = f"4x{latents}x{latents}"
                    print(
                        f"{size:>6} {shape:>8} {experts:>8} {rows:>5} {numbers:>8} {one:>8.3f} {ratio:>6.2f}  "
                        f"{min(ratios):.2f} to {max(ratios):.2f}",
                        flush=True,
                    )


if __name__ == "__main__":
    main()
