"""What is kept in memory is bounded: files, events, jobs, buckets, weights."""

import asyncio
from dataclasses import replace

import pytest
import torch

from atoll.serve.describe import expert_weights
from atoll.serve.event_log import EventLog
from atoll.serve.files import FileStore
from atoll.serve.jobs import JobStore, ServedModel
from atoll.serve.metrics import ServerMetrics
from atoll.serve.rates import RateLimit, client_of_address
from atoll.serve.refusals import Refusal
from atoll.serve.settings import ServerSettings
from atoll.serve.types import ImageRequest, Preview
from tests.serve.fake_engine import image_of


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_files_stay_for_a_bounded_time_and_size() -> None:
    clock = Clock()
    files = FileStore(seconds=10, most_bytes=5, clock=clock)
    first, second = files.add(b"aa"), files.add(b"bbb")
    assert first != second
    assert files.get(first) == b"aa"
    third = files.add(b"c")
    assert [files.get(name) for name in (first, second, third)] == [None, b"bbb", b"c"]
    clock.now = 10
    assert files.get(third) is None
    assert (len(files), files.bytes) == (0, 0)
    assert files.get(files.add(b"too large")) is None


def test_a_log_keeps_the_newest_progress_and_previews_within_bounds() -> None:
    async def main() -> None:
        log = EventLog(preview_bytes=200)
        log.append("started", {})
        for step in range(10):
            log.append("progress", {"step": step})
            log.append("preview", {"step": step, "b64_json": "x" * 50})
        log.append("finished", {}, last=True)
        events = [event async for event in log.follow()]
        assert [event.name for event in events] == ["started", "preview", "progress", "preview", "finished"]
        assert [event.id for event in events] == [1, 19, 20, 21, 22]
        assert [event.id async for event in log.follow(20)] == [21, 22]
        assert [event.id async for event in log.follow(99)] == []

    asyncio.run(main())


def test_readers_of_a_log_wait_for_the_last_event() -> None:
    async def main() -> None:
        log = EventLog(preview_bytes=200)
        readers = [asyncio.create_task(read(log)) for _ in range(3)]
        for name in ("started", "progress", "failed"):
            await asyncio.sleep(0)
            log.append(name, {}, last=name == "failed")
        assert await asyncio.gather(*readers) == [["started", "progress", "failed"]] * 3

    async def read(log: EventLog) -> list[str]:
        return [event.name async for event in log.follow()]

    asyncio.run(main())


def test_a_bucket_refills_with_time() -> None:
    clock = Clock()
    rate = RateLimit(per_minute=12, clock=clock)  # two at once, one every 5 s
    assert [rate.take("a"), rate.take("a"), rate.take("a")] == [0, 0, 5]
    assert rate.take("b") == 0
    clock.now = 2
    assert rate.take("a") == pytest.approx(3)
    clock.now = 5
    assert [rate.take("a"), rate.take("a")] == [0, 5]
    assert RateLimit(0).take("a") == 0


def test_buckets_are_bounded_in_number() -> None:
    rate = RateLimit(per_minute=6, clock=Clock())
    for number in range(10_005):
        rate.take(str(number))
    assert len(rate._buckets) == 10_000


@pytest.mark.parametrize(
    ("address", "client"),
    [
        ("10.0.0.7", "10.0.0.7"),
        ("::ffff:10.0.0.7", "10.0.0.7"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"),
        ("fe80::1%eth0", "fe80::/64"),
        ("testclient", "testclient"),
        (None, "unknown"),
    ],
)
def test_a_client_is_an_address_or_a_network(address, client) -> None:
    assert client_of_address(address) == client


@pytest.fixture
def model(engine) -> ServedModel:
    from atoll.serve.describe import model_card

    return ServedModel(model_card("tiny", engine.pipeline.loaded), engine)


REQUEST = ImageRequest("moss", user="a")


def test_finished_jobs_stay_for_a_bounded_time_and_number(model) -> None:
    async def main() -> None:
        clock = Clock()
        settings = ServerSettings(keep_seconds=10, keep_jobs=2)
        store = JobStore(settings, FileStore(10, 10_000), ServerMetrics({}), clock)
        jobs = []
        for number in range(3):
            clock.now = number
            jobs.append(store.start(model, REQUEST, key=("a", str(number))))
            await jobs[-1].done.wait()
        assert (len(store), store.unfinished) == (2, 0)
        with pytest.raises(Refusal, match="no such job"):
            store.get(jobs[0].id)
        assert store.repeated(("a", "0"), b"") is None
        assert store.repeated(("a", "2"), b"") is jobs[2]
        clock.now = 12
        assert store.repeated(("a", "2"), b"") is None
        assert (len(store), store._bytes, store._keys) == (0, 0, {})

    asyncio.run(main())


def test_finished_jobs_stay_within_a_size(model) -> None:
    async def main() -> None:
        store = JobStore(ServerSettings(keep_bytes=1), FileStore(10, 1), ServerMetrics({}))
        job = store.start(model, REQUEST)
        await job.done.wait()
        assert (job.status, len(store)) == ("finished", 0)

    asyncio.run(main())


def test_a_mistake_while_events_are_handled_is_a_failed_job(model, monkeypatch) -> None:
    async def main() -> None:
        monkeypatch.setattr("atoll.serve.jobs._finished_data", None)
        store = JobStore(ServerSettings(), FileStore(10, 10_000), ServerMetrics({}))
        job = store.start(model, REQUEST)
        await job.done.wait()
        assert job.failure is not None
        assert (job.status, job.failure.reason) == ("failed", "failed")
        assert store.unfinished == 0

    asyncio.run(main())


def test_previews_that_come_faster_than_they_are_encoded_are_left_out(model) -> None:
    async def main() -> None:
        store = JobStore(ServerSettings(keep_bytes=3 * 32), FileStore(10, 10_000), ServerMetrics({}))
        job = store.start(model, REQUEST)
        for step in range(5):
            store._receive(job, Preview(0, step, image_of(0)))  # 32 bytes each
        assert store._raw_bytes == 3 * 32
        await job.done.wait()
        assert (job.status, store._raw_bytes) == ("finished", 0)
        store._receive(job, Preview(0, 1, image_of(0)))
        assert store._raw_bytes == 0

    asyncio.run(main())


def test_jobs_that_the_engine_refuses_leave_nothing(model, engine) -> None:
    async def main() -> None:
        store = JobStore(ServerSettings(), FileStore(10, 10_000), ServerMetrics({}))
        engine.full = True
        for _ in range(2):
            with pytest.raises(Refusal, match="wait already") as error:
                store.start(model, replace(REQUEST, seeds=(1, 2)), key=("a", "k"))
            assert (error.value.status, error.value.retry_after) == (503, 2)
        assert (len(store), store._images, store._keys) == (0, {}, {})

    asyncio.run(main())


def test_weights_over_many_evaluations_are_thinned() -> None:
    times = torch.linspace(1, 0, 1001)
    weights = torch.rand(1001, 2, 3)
    data = expert_weights(times, weights)
    assert (len(data["times"]), len(data["weights"]), len(data["weights"][1])) == (256, 2, 256)
    assert (data["times"][0], data["times"][-1]) == (1.0, 0.0)
    assert data["weights"][1][-1] == [round(weight, 4) for weight in weights[-1, 1].tolist()]
    assert expert_weights(times[:2], weights[:2])["times"] == [1.0, 0.999]
