"""Who is served: equal shares, priorities, short jobs and resident experts first, nobody starves."""

from collections import Counter
from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st

from atoll.image_size import ImageSize
from atoll.serve.queue import FairQueue
from atoll.serve.types import ImageJob, ImageRequest
from atoll.serve.unit import EngineJob, Settings, Unit

SETTINGS = Settings(10, 1.0, (0.0, 1.0), "euler", "top-1", "snr", None, ImageSize(8, 8), 1.0)


def work(images: int, steps: int = 10, arrival: int = 0, size: int = 4, **request) -> EngineJob:
    own = replace(SETTINGS, routing=request.get("routing", SETTINGS.routing))
    job = EngineJob(ImageJob(ImageRequest("moss", tuple(range(images)), **request), print), own, arrival=arrival)
    job.units = [Unit(job, range(start, min(start + size, images))) for start in range(0, images, size)]
    job.evaluations_left = images * steps
    return job


def serve(queue: FairQueue, images: int, ticks: int) -> Counter[str]:
    """The image evaluations that each user receives; nothing ends."""
    received = Counter[str]()
    for _ in range(ticks):
        for unit in queue.select(images):
            received[unit.job.user] += len(unit)
    return received


@settings(max_examples=20)
@given(st.lists(st.integers(4, 20), min_size=2, max_size=5), st.integers(1, 4))
def test_users_with_enough_to_do_receive_equal_shares(units, batch) -> None:
    """Units and batches of four: otherwise a unit that fills a gap, which nobody else could fill, comes on top."""
    queue = FairQueue(slack=16 * batch)
    for number, count in enumerate(units):
        queue.add(work(4 * count, arrival=number, user=str(number)))
    received = serve(queue, 4 * batch, 60)
    assert sum(received.values()) == 60 * 4 * batch
    assert max(received.values()) - min(received[str(n)] for n in range(len(units))) <= 6 * 4 * batch


def test_a_priority_of_one_doubles_the_share() -> None:
    queue = FairQueue(slack=16)
    queue.add(work(64, user="a"))
    queue.add(work(64, arrival=1, user="b", priority=1))
    received = serve(queue, 4, 3000)
    assert 1.9 < received["b"] / received["a"] < 2.1


def test_a_large_request_is_not_starved_by_a_stream_of_new_users() -> None:
    queue, received = FairQueue(slack=16), 0
    queue.add(work(64, steps=1000, user="large"))
    for tick in range(400):
        queue.add(one := work(4, steps=1, arrival=tick + 1, user=str(tick)))
        for unit in queue.select(4):
            received += len(unit) * (unit.job.user == "large")
            if unit.job is not one and unit.job.user != "large":
                queue.remove(unit)
        if one.units[0] in list(queue) and tick % 2:
            queue.remove(one.units[0])
    assert received >= 400 * 4 / 10


def test_waiting_earns_nothing() -> None:
    """A user who comes late does not get the share of the time before."""
    queue = FairQueue(slack=8)
    queue.add(work(64, user="early"))
    serve(queue, 4, 1000)
    queue.add(work(64, arrival=1, user="late"))
    received = serve(queue, 4, 100)
    assert received["early"] >= 150


def test_short_jobs_and_deadlines_come_first_and_the_batch_is_filled() -> None:
    queue = FairQueue(slack=1000)
    queue.add(long := work(6, steps=50))
    queue.add(short := work(2, steps=2, arrival=1))
    queue.add(due := work(4, steps=90, arrival=2, deadline=60.0))
    assert queue.select(4) == due.units
    assert queue.select(6) == [*due.units, *short.units]
    assert queue.select(8) == [*due.units, *short.units, long.units[1]]


def test_a_user_with_many_routings_does_not_take_the_time_of_the_others() -> None:
    queue = FairQueue(slack=1000)
    many = [work(1, arrival=number, user="many", routing=f"top-{number + 1}") for number in range(8)]
    for one in many:
        queue.add(one)
    # Alone, it may have as many at a tick as fit.
    assert len(queue.select(64)) == 8
    queue.add(other := work(1, arrival=8, user="other", routing="full"))
    queue.add(same := work(1, arrival=9, user="many", routing="full"))
    for _ in range(20):
        selected = queue.select(64)
        assert other.units[0] in selected
        assert same.units[0] in selected  # in the same evaluation
        assert len({unit.job.options for unit in selected}) == 2


def test_units_whose_experts_are_on_the_device_come_first_within_the_slack() -> None:
    queue = FairQueue(slack=8)
    queue.add(a := work(4, user="a"))
    queue.add(b := work(4, arrival=1, user="b"))
    a.units[0].experts, b.units[0].experts = frozenset({0}), frozenset({1, 2})
    served = [queue.select(4, resident={1, 2})[0].job.user for _ in range(40)]
    assert served[0] == "b"
    assert 15 <= served.count("a") <= 25
