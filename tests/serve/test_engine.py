"""The engine: shared steps give the pipeline's images; fairness, cancellation, deadlines, faults of one request."""

import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from atoll.errors import AtollError
from atoll.pipeline import Pipeline
from atoll.serve.engine import Engine, EngineLimits
from atoll.serve.stepper import Stepper
from atoll.serve.types import Failed, Finished, ImageRequest, JobProgress, Preview, QueueFullError, Started

WORDS = ("moss", "sand", "rain", "rust")


@pytest.fixture(scope="module")
def pipe(trained_run) -> Pipeline:
    return Pipeline.from_pretrained(trained_run / "ensemble")


@pytest.fixture
def engine(pipe):
    with Engine(pipe) as engine:
        yield engine


class Events(list):
    """A listener that keeps its events."""

    def __call__(self, event) -> None:
        self.append(event)

    @property
    def kinds(self) -> list[type]:
        return [type(event) for event in self]


class Gate:
    """A listener that holds the step loop at the first step of a job, until it is opened."""

    def __init__(self) -> None:
        self.reached, self.opened, self.events = threading.Event(), threading.Event(), Events()

    def __call__(self, event) -> None:
        self.events(event)
        if isinstance(event, Started):
            self.reached.set()
            self.opened.wait()


def run(engine: Engine, *requests: ImageRequest) -> list[Events]:
    """Submit all requests while the engine is held, so that they share their steps, and wait for all."""
    gate = Gate()
    engine.submit(ImageRequest("rain", steps=1), gate)
    gate.reached.wait()
    events = [Events() for _ in requests]
    jobs = [engine.submit(request, listener) for request, listener in zip(requests, events, strict=True)]
    gate.opened.set()
    for job in jobs:
        job.done.wait()
    return events


def expected(pipe: Pipeline, request: ImageRequest):
    """What the pipeline answers to a request alone."""
    pipeline = pipe
    if request.alignment != "snr":
        ensemble = replace(pipe.loaded.ensemble, alignment=request.alignment)
        pipeline = Pipeline(replace(pipe.loaded, ensemble=ensemble), pipe.device)
    return pipeline(
        request.prompt,
        request.steps,
        request.guidance_scale,
        seeds=request.seeds,
        images_per_prompt=len(request.seeds),
        negative_prompt=request.negative_prompt,
        method=request.method,
        routing=request.routing,
        clusters=None if request.cluster is None else [request.cluster],
        guidance_range=request.guidance_range,
    )


def assert_like_the_pipeline(pipe: Pipeline, request: ImageRequest, events: Events) -> None:
    last = events[-1]
    assert isinstance(last, Finished), last
    output = expected(pipe, request)
    for image, own in zip(last.images, output.images, strict=True):
        assert np.abs(np.asarray(image, int) - np.asarray(own, int)).max() <= 1
    torch.testing.assert_close(last.latents, output.latents, rtol=1e-4, atol=1e-4)
    weights = torch.stack(output.traces[0].weights)
    assert last.weights.shape == weights.shape
    torch.testing.assert_close(last.weights, weights, rtol=1e-3, atol=1e-3)


REQUESTS = st.builds(
    ImageRequest,
    prompt=st.lists(st.sampled_from(WORDS), min_size=1, max_size=3).map(" ".join),
    seeds=st.lists(st.integers(0, 99), min_size=1, max_size=6).map(tuple),
    negative_prompt=st.none() | st.sampled_from(WORDS),
    steps=st.integers(1, 5),
    guidance_scale=st.sampled_from([0.0, 2.0, 3.5]),
    guidance_range=st.sampled_from([(0.0, 1.0), (0.3, 0.8)]),
    method=st.sampled_from(["euler", "heun", "midpoint", "dpm++2m"]),
    routing=st.sampled_from([None, "top-1", "full", "oracle"]),
    alignment=st.sampled_from(["snr", "native"]),
    cluster=st.integers(0, 2),
    user=st.sampled_from("ab"),
)


@settings(max_examples=15)
@given(st.lists(REQUESTS, min_size=1, max_size=5))
def test_images_are_those_of_the_pipeline_whoever_shares_the_batch(pipe, requests) -> None:
    with Engine(pipe) as engine:
        for request, events in zip(requests, run(engine, *requests), strict=True):
            assert_like_the_pipeline(pipe, request, events)


def test_a_request_joins_while_others_run_and_shares_their_evaluations(pipe) -> None:
    late = Events()
    first, second = ImageRequest("moss", (1,), steps=6), ImageRequest("rust sand", (2,), steps=4)
    with Engine(pipe) as engine:
        jobs = []

        def join(event) -> None:
            events(event)
            if isinstance(event, JobProgress) and event.step == 2:
                jobs.append(engine.submit(second, late))

        events = Events()
        engine.submit(first, join).done.wait()
        jobs[0].done.wait()
        ticks = engine.statistics()["ticks"]
    assert_like_the_pipeline(pipe, first, events)
    assert_like_the_pipeline(pipe, second, late)
    assert 6 <= ticks < 10  # the second shared at least one of the first's last four ticks


def test_events_come_in_order_and_end_with_one_last(engine) -> None:
    events = Events()
    engine.submit(ImageRequest("moss", (1, 2), steps=5, preview_every=2), events).done.wait()
    assert events.kinds[0] is Started
    assert events.kinds[-1] is Finished
    assert [event.step for event in events if isinstance(event, JobProgress)] == [1, 2, 3, 4, 5]
    assert {event.step for event in events if isinstance(event, Preview)} <= {2, 4}
    assert events.kinds.count(Finished) == 1


def test_a_small_request_does_not_wait_for_a_large_one_of_another_user(pipe) -> None:
    order, gate = [], Gate()
    with Engine(pipe, EngineLimits(batch=4)) as engine:
        engine.submit(ImageRequest("rain", steps=1), gate)
        gate.reached.wait()

        def noted(name):
            return lambda event: order.append(name) if isinstance(event, Finished) else None

        large = [ImageRequest("moss", tuple(range(16)), steps=4, user="a") for _ in range(3)]
        jobs = [engine.submit(request, noted("large")) for request in large]
        jobs.append(engine.submit(ImageRequest("rain", (1,), steps=4, user="b"), noted("small")))
        gate.opened.set()
        for job in jobs:
            job.done.wait()
    assert order[0] == "small"


def test_users_receive_equal_shares_whatever_they_ask_for(pipe) -> None:
    """Both ask for much; when one has half of its images, so has the other, up to the slack."""
    steps, finished, gate = 8, [], Gate()
    with Engine(pipe, EngineLimits(batch=4)) as engine:
        engine.submit(ImageRequest("rain", steps=1), gate)
        gate.reached.wait()
        jobs = []
        for user, count in (("greedy", 12), ("modest", 4)):
            for number in range(count):
                request = ImageRequest("moss", (number,) * 4, steps=steps, user=user)
                jobs.append(
                    engine.submit(request, lambda e, u=user: finished.append(u) if isinstance(e, Finished) else None)
                )
        gate.opened.set()
        for job in jobs:
            job.done.wait()
    # As long as both have work, neither has finished more than the slack (4 batches of evaluations) and a job ahead.
    counts = {"greedy": 0, "modest": 0}
    for user in finished:
        counts[user] += 1
        if counts["modest"] == 4:
            break
        assert abs(counts["greedy"] - counts["modest"]) <= 2, finished
    assert counts["greedy"] <= 6, finished


def test_the_end_of_a_prompt_that_is_cut_off_is_named(engine) -> None:
    (events,) = run(engine, ImageRequest("moss rain sand rust moss", (1,), steps=1, negative_prompt="rain"))
    assert events[-1].truncated == ("rust moss",)


def test_cancellation_frees_the_place_and_is_the_last_event(engine) -> None:
    events, jobs = Events(), []

    def cancel(event) -> None:
        events(event)
        if isinstance(event, JobProgress) and event.step == 2:
            jobs[0].cancel()

    gate = Gate()
    engine.submit(ImageRequest("rain", steps=1), gate)
    gate.reached.wait()
    jobs.append(engine.submit(ImageRequest("moss", (1,), steps=1000), cancel))
    gate.opened.set()
    jobs[0].done.wait()
    assert events[-1] == Failed("cancelled", "the request was cancelled")
    assert max(event.step for event in events if isinstance(event, JobProgress)) == 2
    assert engine.statistics()["images"] == 0
    # It takes no part in later steps: one evaluation of each of the two short requests, two of the cancelled one.
    engine.submit(ImageRequest("sand", (1,), steps=1), Events()).done.wait()
    assert engine.statistics()["images_stepped"] == 4


def test_a_deadline_that_has_passed_fails_the_request(engine) -> None:
    (events,) = run(engine, ImageRequest("moss", (1,), steps=1000, deadline=0.0))
    assert events == [Failed("deadline", "the images were not ready within 0 seconds")]


def test_what_is_unfinished_is_told_when_the_engine_closes(pipe) -> None:
    engine, events, gate = Engine(pipe), Events(), Gate()
    engine.submit(ImageRequest("rain", steps=100_000), gate)
    gate.reached.wait()
    waiting = engine.submit(ImageRequest("moss", (1,)), events)
    gate.opened.set()
    engine.close()
    waiting.done.wait()
    assert events.kinds[-1] is Failed
    assert events[-1].reason == "closed"
    assert gate.events[-1].reason == "closed"
    with pytest.raises(AtollError, match="closed"):
        engine.submit(ImageRequest("moss"), events)
    assert not engine.alive
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("atoll-")]


def test_a_full_queue_refuses_and_says_so(pipe) -> None:
    gate = Gate()
    with Engine(pipe, EngineLimits(queue=3)) as engine:
        engine.submit(ImageRequest("rain", (0, 1), steps=1), gate)
        gate.reached.wait()
        with pytest.raises(QueueFullError, match="2 images wait already and 2 more were requested; the limit is 3"):
            engine.submit(ImageRequest("moss", (1, 2)), Events())
        job = engine.submit(ImageRequest("moss", (1,), steps=1), Events())
        gate.opened.set()
        job.done.wait()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"seeds": ()}, "no seeds"),
        ({"steps": 0}, "steps is 0"),
        ({"method": "rk45"}, "unknown method"),
        ({"routing": "best"}, "routing"),
        ({"routing": "oracle"}, "needs the images' cluster"),
        ({"cluster": 9}, "no expert covers cluster 9"),
        ({"priority": 9}, "priority is 9"),
        ({"preview_every": -1}, "preview_every is -1"),
        ({"negative_prompt": "rain", "guidance_scale": 1.0}, "a negative prompt needs guidance"),
    ],
)
def test_what_cannot_be_sampled_is_refused_at_once(engine, arguments, message) -> None:
    with pytest.raises(AtollError, match=message):
        engine.submit(ImageRequest("moss", **arguments), Events())
    assert engine.statistics()["jobs"] == 0


class Broken(torch.nn.Module):
    """A network that fails for some prompts: it knows them by the noise's first number."""

    def __init__(self, network, seed_value: float, answer):
        super().__init__()
        self.network, self.seed_value, self.answer = network, seed_value, answer

    def forward(self, x, time, condition):
        output = self.network(x, time, condition).clone()
        bad = (x[:, 0, 0, 0] - self.seed_value).abs() < 0.5
        return self.answer(output, bad)


def broken(pipe: Pipeline, index: int, answer, seed: int = 7) -> Pipeline:
    """The pipeline with one expert that fails for the image of a seed."""
    experts = list(pipe.loaded.ensemble.experts)
    network = Broken(experts[index].network, float(pipe.noise([seed])[0, 0, 0, 0]), answer)
    experts[index] = replace(experts[index], network=network)
    return Pipeline(replace(pipe.loaded, ensemble=replace(pipe.loaded.ensemble, experts=experts)), pipe.device)


def test_an_expert_that_answers_one_job_with_nan_is_left_out_of_that_job_only(pipe) -> None:
    def nan(output, bad):
        output[bad] = torch.nan
        return output

    requests = [
        ImageRequest("moss", (7,), steps=2, routing="full"),
        ImageRequest("moss", (3,), steps=2, routing="full"),
    ]
    with Engine(broken(pipe, 1, nan)) as engine:
        hit, other = run(engine, *requests)
    assert hit[-1].dropped == (pipe.loaded.ensemble.experts[1].name,)
    assert (hit[-1].weights[:, :, 1] == 0).all()
    assert other[-1].dropped == ()
    assert_like_the_pipeline(pipe, requests[1], other)


def test_a_fault_of_one_job_does_not_concern_the_others(pipe) -> None:
    def crash(output, bad):
        if bad.any():
            raise RuntimeError("a kernel failed")
        return output

    requests = [
        ImageRequest("moss", (7,), steps=2, routing="full"),
        ImageRequest("moss", (3,), steps=2, routing="full"),
    ]
    with Engine(broken(pipe, 1, crash)) as engine:
        hit, other = run(engine, *requests)
    assert hit[-1] == Failed("failed", "sampling failed (RuntimeError); the server's log says more")
    assert_like_the_pipeline(pipe, requests[1], other)


@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("no memory"), RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried")],
)
def test_a_batch_that_does_not_fit_is_halved_and_sampled_all_the_same(pipe, error) -> None:
    def full(output, bad):
        if len(output) > 6:
            raise error
        return output

    request = ImageRequest("moss", tuple(range(20, 36)), steps=2, routing="full", guidance_scale=1.0)
    with Engine(broken(pipe, 1, full)) as engine:
        (events,) = run(engine, request)
        assert engine.statistics()["batch"] <= 6
    assert_like_the_pipeline(pipe, request, events)


def test_an_image_that_does_not_fit_alone_fails_and_names_the_memory(pipe) -> None:
    def full(output, bad):
        raise torch.OutOfMemoryError("no memory")

    with Engine(broken(pipe, 1, full)) as engine:
        (events,) = run(engine, ImageRequest("moss", (1, 2), steps=2, routing="full"))
    assert events[-1] == Failed("failed", "too little memory for this request; request fewer images, or try later")


def test_a_listener_that_fails_does_not_stop_the_engine(engine) -> None:
    def fails(event) -> None:
        raise ValueError("mine")

    engine.submit(ImageRequest("moss", (1,), steps=1), fails).done.wait()
    events = Events()
    engine.submit(ImageRequest("moss", (1,), steps=1), events).done.wait()
    assert events.kinds[-1] is Finished


def test_experts_on_the_device_come_first_and_images_stay_the_same(trained_run, pipe) -> None:
    ensemble = trained_run / "ensemble"
    sizes = [sum(p.nbytes for p in e.network.parameters()) for e in pipe.loaded.ensemble.experts]
    router = sum(p.nbytes for p in pipe.loaded.ensemble.router.parameters())
    small = Pipeline.from_pretrained(ensemble, memory_budget=router + 2 * max(sizes))
    requests = [ImageRequest("moss", (1, 2), steps=3), ImageRequest("rust", (3,), steps=3), ImageRequest("sand", (4,))]
    with Engine(small, EngineLimits(batch=2)) as engine:
        for request, events in zip(requests, run(engine, *requests), strict=True):
            assert_like_the_pipeline(pipe, request, events)


def test_routings_that_others_displace_stay_usable(pipe, monkeypatch) -> None:
    monkeypatch.setattr("atoll.serve.stepper._MAX_ENSEMBLES", 1)
    stepper = Stepper(pipe)

    def displace(number: int) -> None:
        for turn in range(2000):
            stepper.ensemble(f"top-{number + 2 * turn + 1}", "snr")

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(displace, range(2)))
    finally:
        sys.setswitchinterval(interval)
