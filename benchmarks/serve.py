"""The engine of `atoll serve` against servers that take one request, or one batch of requests, at a time.

    python benchmarks/serve.py --rounds 3 --json serve.json

8 random experts S/2 at 64 tokens, top-2, guidance, one image of 10 steps per request. All servers call the same
networks through `atoll.Pipeline` or the engine:

- one: one request after the other.
- window: waits up to 0.5 s for requests, then samples up to 16 of them together.
- threads: each request in a thread of its own, four at a time, as diffusers' examples/server-async does.
- engine: `atoll.serve.engine.Engine`.

First all requests come at once (saturation: images per second). Then they come as a Poisson process at 0.9 times the
rate of "one" (latency from arrival to the image). Last, the part of a tick that is spent outside the networks. Every
round runs all servers, in turn; printed are medians over rounds, and the range of the ratios.
"""

import argparse
import json
import queue
import random
import statistics
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from atoll.calibration import Calibration
from atoll.encoders.codec import build_codec
from atoll.encoders.text import build_encoder
from atoll.encoders.text.prompt_encoder import PromptEncoder
from atoll.ensemble import Ensemble, Expert
from atoll.ensemble.loading import LoadedEnsemble
from atoll.nn.dit import SIZES, DiT, DiTConfig
from atoll.objective import Objective
from atoll.pipeline import Pipeline
from atoll.serve.engine import Engine, EngineLimits
from atoll.serve.types import ImageRequest
from atoll.storage.cards import ExpertCard

EXPERTS, TEXT, LENGTH, GUIDANCE, STEPS = 8, 384, 16, 4.0, 10
LATENT = (3, 16, 16)
WINDOW, WINDOW_BATCH, THREADS = 0.5, 16, 4
WORDS = [f"word{number}" for number in range(1000)]

Done = Callable[[], None]


def build(size: str, dtype: torch.dtype) -> Pipeline:
    """Eight random experts and a router that spreads the prompts evenly."""
    torch.manual_seed(0)
    encoder = build_encoder({"name": "hash", "dim": TEXT, "length": LENGTH})
    experts = []
    for k in range(EXPERTS):
        config = DiTConfig(size=LATENT[1:], channels=LATENT[0], states_dim=TEXT, **SIZES[size])
        network = DiT(config).to(dtype).eval().requires_grad_(False)
        for parameter in network.parameters():
            torch.nn.init.normal_(parameter, std=0.02)
        objective = Objective("eps", "cosine") if k % 2 else Objective("flow", "linear")
        experts.append(Expert(network, objective, (k,), Calibration.identity(torch.zeros(LATENT)), str(k)))
    weights = torch.randn(TEXT, EXPERTS) / TEXT**0.5

    def router(x: Tensor, t: Tensor, pooled: Tensor | None = None) -> Tensor:
        assert pooled is not None
        return torch.log_softmax(2 * pooled.float() @ weights, dim=1)

    ensemble = Ensemble(experts, router, "top-2", null=(encoder.null(1),))
    codec = build_codec({"name": "pixels", "channels": LATENT[0]})
    card = ExpertCard.model_construct()  # no defaults of sampling
    return Pipeline(LoadedEnsemble(ensemble, PromptEncoder([encoder]), codec, LATENT, card))


class Server:
    """Answers requests; `submit` returns at once."""

    def __init__(self, pipeline: Pipeline):
        self.pipeline = pipeline

    def submit(self, prompt: str, seed: int, done: Done) -> None: ...

    def close(self) -> None: ...

    def sample(self, pipeline: Pipeline, prompts: Sequence[str], seeds: Sequence[int]) -> None:
        pipeline(prompts, STEPS, GUIDANCE, seeds=seeds)


class One(Server):
    """Takes whatever waits, `most` requests at a time, after waiting `window` seconds for more."""

    window, most = 0.0, 1

    def __init__(self, pipeline: Pipeline):
        super().__init__(pipeline)
        self._waiting: queue.Queue[tuple[str, int, Done] | None] = queue.Queue()
        self._thread = threading.Thread(target=self._loop)
        self._thread.start()

    def submit(self, prompt: str, seed: int, done: Done) -> None:
        self._waiting.put((prompt, seed, done))

    def close(self) -> None:
        self._waiting.put(None)
        self._thread.join()

    def _loop(self) -> None:
        while (first := self._waiting.get()) is not None:
            batch, end = [first], time.monotonic() + self.window
            while len(batch) < self.most:
                try:
                    following = self._waiting.get(timeout=max(0.0, end - time.monotonic()))
                except queue.Empty:
                    break
                if following is None:
                    self._waiting.put(None)
                    break
                batch.append(following)
            self.sample(self.pipeline, [prompt for prompt, _, _ in batch], [seed for _, seed, _ in batch])
            for _, _, done in batch:
                done()


class Window(One):
    window, most = WINDOW, WINDOW_BATCH


class Threads(Server):
    def __init__(self, pipeline: Pipeline):
        super().__init__(pipeline)
        self._pool = ThreadPoolExecutor(THREADS)

    def submit(self, prompt: str, seed: int, done: Done) -> None:
        self._pool.submit(self._run, prompt, seed, done)

    def _run(self, prompt: str, seed: int, done: Done) -> None:
        # A sampler is for one thread; the networks are shared.
        self.sample(Pipeline(self.pipeline.loaded), [prompt], [seed])
        done()

    def close(self) -> None:
        self._pool.shutdown()


class Shared(Server):
    def __init__(self, pipeline: Pipeline):
        super().__init__(pipeline)
        self.engine = Engine(pipeline, EngineLimits(queue=100_000))

    def submit(self, prompt: str, seed: int, done: Done) -> None:
        request = ImageRequest(prompt, (seed,), steps=STEPS, guidance_scale=GUIDANCE, user=str(seed))
        self.engine.submit(request, lambda event: done() if hasattr(event, "images") else None)

    def close(self) -> None:
        self.engine.close()


SERVERS: dict[str, type[Server]] = {"one": One, "window": Window, "threads": Threads, "engine": Shared}


def play(server: Server, prompts: Sequence[str], gaps: Sequence[float]) -> tuple[float, list[float]]:
    """Submit each prompt after its gap; return the seconds until the last image, and each request's latency."""
    latencies = [0.0] * len(prompts)
    left = threading.Semaphore(0)
    begin = time.monotonic()
    arrival = begin
    for number, (prompt, gap) in enumerate(zip(prompts, gaps, strict=True)):
        arrival += gap
        time.sleep(max(0.0, arrival - time.monotonic()))

        def done(number: int = number, arrival: float = arrival) -> None:
            latencies[number] = time.monotonic() - arrival
            left.release()

        server.submit(prompt, number, done)
    for _ in prompts:
        left.acquire()
    seconds = time.monotonic() - begin
    server.close()
    return seconds, latencies


def overhead(pipeline: Pipeline, prompts: Sequence[str]) -> float:
    """Return the fraction of the step loop's time outside the experts' networks, at saturation."""
    inside, started = 0.0, 0.0

    def before(*_: Any) -> None:
        nonlocal started
        started = time.perf_counter()

    def after(*_: Any) -> None:
        nonlocal inside
        inside += time.perf_counter() - started

    networks = [e.network for e in pipeline.loaded.ensemble.experts if isinstance(e.network, nn.Module)]
    hooks = [hook for n in networks for hook in (n.register_forward_pre_hook(before), n.register_forward_hook(after))]
    server = Shared(pipeline)
    play(server, prompts, [0.0] * len(prompts))
    for hook in hooks:
        hook.remove()
    return 1 - inside / server.engine.statistics()["seconds"]["step"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="S/2", choices=SIZES)
    parser.add_argument("--requests", type=int, default=64, help="at once")
    parser.add_argument("--arrivals", type=int, default=24, help="of the Poisson process")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", default="bf16", choices=["bf16", "fp32"])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    if not 1 <= arguments.arrivals <= arguments.requests:
        parser.error(f"--arrivals is {arguments.arrivals}; expected 1 to --requests {arguments.requests}")
    torch.set_num_threads(arguments.threads)
    pipeline = build(arguments.size, torch.bfloat16 if arguments.dtype == "bf16" else torch.float32)
    draw = random.Random(0)
    prompts = [" ".join(draw.sample(WORDS, 5)) for _ in range(arguments.requests)]
    pipeline(prompts[:2], 1, GUIDANCE, seeds=[0, 1])  # the first call allocates

    # All servers in turn, round by round.
    rates: dict[str, list[float]] = {name: [] for name in SERVERS}
    medians: dict[str, list[float]] = {name: [] for name in SERVERS}
    overheads = []
    for number in range(arguments.rounds):
        for name, server in SERVERS.items():
            seconds, _ = play(server(pipeline), prompts, [0.0] * len(prompts))
            rates[name].append(len(prompts) / seconds)
        gaps = [draw.expovariate(0.9 * rates["one"][-1]) for _ in range(arguments.arrivals)]
        for name, server in SERVERS.items():
            latencies = play(server(pipeline), prompts[: len(gaps)], gaps)[1]
            medians[name].append(statistics.median(latencies))
        overheads.append(overhead(pipeline, prompts))
        print(f"round {number + 1}", {n: round(r[-1], 2) for n, r in rates.items()}, flush=True)
        if arguments.json:
            result = {"images_per_second": rates, "median_latency": medians, "overhead": overheads}
            arguments.json.write_text(json.dumps(result, indent=2) + "\n")

    # The table.
    print(f"{EXPERTS} experts {arguments.size}, {len(prompts)} requests of {STEPS} steps, {arguments.threads} threads")
    print(f"{'server':8} {'images/s':>9} {'engine is faster by':>22} {'latency s':>10} {'engine needs':>16}")
    for name in SERVERS:
        ratios = sorted(a / b for a, b in zip(rates["engine"], rates[name], strict=True))
        parts = sorted(a / b for a, b in zip(medians["engine"], medians[name], strict=True))
        print(
            f"{name:8} {statistics.median(rates[name]):9.2f} {statistics.median(ratios):8.2f} ({ratios[0]:.2f} to "
            f"{ratios[-1]:.2f}) {statistics.median(medians[name]):10.2f} {statistics.median(parts):6.2f} "
            f"({parts[0]:.2f} to {parts[-1]:.2f})"
        )
    print(f"outside the networks: {100 * statistics.median(overheads):.1f} % of a tick")


if __name__ == "__main__":
    main()
