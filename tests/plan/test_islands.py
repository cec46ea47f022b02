import random
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from atoll.errors import AtollError
from atoll.plan.islands import (
    IslandSettings,
    SimulatedIsland,
    Work,
    assign,
    load_islands,
    quantile,
    run_island,
    simulate,
)

HOUR = 3600.0

island_settings = st.builds(
    IslandSettings,
    name=st.just("anna"),
    tflops=st.just(1.0),
    hours_per_day=st.floats(1, 24),
    failures_per_day=st.floats(0, 3),
    dropouts_per_day=st.floats(0, 0.5),
    repair_hours=st.floats(0, 5),
    replace_days=st.floats(0, 5),
    slowdown=st.floats(0, 0.5),
    download_mbit=st.none() | st.floats(1, 1000),
)
queues = st.lists(st.floats(1e3, 1e5), min_size=1, max_size=3).map(
    lambda sizes: [Work(f"e{i}", images, interval=images / 20, download=1e9) for i, images in enumerate(sizes)]
)


def island(settings: IslandSettings, works: list[Work], images_per_s: float = 1.0) -> SimulatedIsland:
    return SimulatedIsland(settings, {work.name: images_per_s for work in works})


def named(name: str, **settings: float) -> IslandSettings:
    return IslandSettings(name=name, tflops=1.0, memory_gb=24, **settings)


@given(island_settings, queues, st.integers(0, 99), st.floats(1, 4))
def test_a_faster_island_is_never_later(s: IslandSettings, works: list[Work], seed: int, factor: float) -> None:
    slow = run_island(island(s, works, 1.0), works, random.Random(seed))
    fast = run_island(island(s, works, factor), works, random.Random(seed))
    assert fast.days <= slow.days * (1 + 1e-12)
    assert fast.failures <= slow.failures


@given(island_settings, queues, st.integers(0, 99), st.floats(0, 12))
def test_more_hours_a_day_are_never_later(s: IslandSettings, works: list[Work], seed: int, more: float) -> None:
    longer = s.model_copy(update={"hours_per_day": min(24, s.hours_per_day + more)})
    before = run_island(island(s, works), works, random.Random(seed))
    after = run_island(island(longer, works), works, random.Random(seed))
    assert after.days <= before.days * (1 + 1e-12)
    assert after.hours == before.hours


@given(island_settings, queues, st.integers(0, 99))
def test_no_work_is_lost_or_invented(s: IslandSettings, works: list[Work], seed: int) -> None:
    outcome = run_island(island(s, works), works, random.Random(seed))
    assert outcome.trained - outcome.lost == pytest.approx(sum(work.images for work in works))
    events = outcome.failures + outcome.dropouts
    assert 0 <= outcome.lost <= events * max(work.interval for work in works) * (1 + 1e-9)


def test_half_an_interval_is_lost_on_average() -> None:
    work = Work("e", images=1e7, interval=1e4)  # failures lie some four intervals apart
    s = named("anna", failures_per_day=2)
    runs = [run_island(island(s, [work]), [work], random.Random(seed)) for seed in range(20)]
    lost = sum(run.lost for run in runs) / sum(run.failures for run in runs)
    assert lost == pytest.approx(work.interval / 2, rel=0.1)


def test_failures_come_as_often_as_stated() -> None:
    work = Work("e", images=1e6, interval=1.0)  # nothing to speak of is lost
    s = named("anna", failures_per_day=3, dropouts_per_day=1)
    runs = [run_island(island(s, [work]), [work], random.Random(seed)) for seed in range(100)]
    days = 1e6 / HOUR / 24
    assert sum(run.failures for run in runs) / 100 == pytest.approx(3 * days, rel=0.05)
    assert sum(run.dropouts for run in runs) / 100 == pytest.approx(days, rel=0.1)


@given(st.floats(1, 24), st.floats(0.1, 20), st.floats(10, 1000))
def test_without_failures_the_end_is_closed_form(per_day: float, rate: float, mbit: float) -> None:
    works = [Work("a", 36_000, 100, download=4.5e8), Work("b", 18_000, 100, download=4.5e8)]
    only = island(named("anna", hours_per_day=per_day, download_mbit=mbit), works, rate)
    result = simulate(works, [only], trials=3)
    hours = 54_000 / rate / HOUR + 2 * 4.5e8 * 8 / (mbit * 1e6) / HOUR
    assert result.hours["anna"] == pytest.approx(hours)
    whole_days = -(-(hours * (1 - 1e-12)) // per_day) - 1
    assert result.median_days == pytest.approx((hours + whole_days * (24 - per_day)) / 24)
    assert result.p90_days == result.median_days
    assert (result.lost, result.failures, result.decides) == (0, 0, {"anna": 1.0})


def test_nights_count_between_days_only() -> None:
    works = [Work("a", 24 * HOUR, 1.0)]
    assert simulate(works, [island(named("anna", hours_per_day=24), works)], 1).median_days == 1
    # Two days of twelve hours: the second one ends twelve hours before midnight.
    assert simulate(works, [island(named("anna", hours_per_day=12), works)], 1).median_days == 1.5


def test_longest_first_and_each_to_the_first_to_finish() -> None:
    works = [Work("short", 10, 1), Work("long", 40, 1), Work("middle", 20, 1)]
    fast, slow = island(named("fast"), works, 2.0), island(named("slow"), works, 1.0)
    assignment = assign(works, [slow, fast])
    # long: fast (20 s); middle: slow (20 s) before fast (30 s); short: fast (25 s) before slow (30 s).
    assert {name: [w.name for w in queue] for name, queue in assignment.items()} == {
        "fast": ["long", "short"],
        "slow": ["middle"],
    }


@given(st.lists(st.floats(1, 9), min_size=1, max_size=5), st.integers(1, 9), st.integers(0, 4))
def test_one_faster_island_never_delays_equal_experts(speeds: list[float], experts: int, which: int) -> None:
    works = [Work(f"e{i}", 1000, 10) for i in range(experts)]

    def end(factor: float) -> float:
        rates = [speed * (factor if i == which else 1) for i, speed in enumerate(speeds)]
        return simulate(works, [island(named(f"i{i}"), works, r) for i, r in enumerate(rates)], 1).median_days

    assert end(1.7) <= end(1.0) * (1 + 1e-12)


def test_the_slow_island_decides_and_the_other_is_idle() -> None:
    works = [Work("a", 1000, 10), Work("b", 1000, 10)]
    fast = SimulatedIsland(named("fast"), {"a": 4.0})
    slow = SimulatedIsland(named("slow"), {"b": 1.0})
    result = simulate(works, [fast, slow], trials=5)
    assert result.decides == {"slow": 1.0}
    assert result.idle == pytest.approx(0.75 / 2)
    assert result.assignment == {"fast": ("a",), "slow": ("b",)}


def test_a_function_of_the_seed() -> None:
    works = [Work("a", 1e6, 1e4), Work("b", 1e6, 1e4)]
    both = [island(named(n, failures_per_day=2, slowdown=0.1), works) for n in ("anna", "ben")]
    assert simulate(works, both, 50, seed=3) == simulate(works, both, 50, seed=3)
    assert simulate(works, both, 50, seed=3).median_days != simulate(works, both, 50, seed=4).median_days
    once = simulate(works, both, 1).hours
    assert once["anna"] != once["ben"]  # equal islands, each with luck of its own
    # What happens to one island does not depend on another one's luck.
    unlucky = [both[0], replace(both[1], settings=named("ben", failures_per_day=20))]
    assert simulate(works, both, 50).hours["anna"] == simulate(works, unlucky, 50).hours["anna"]


def test_a_dropout_is_replaced_and_downloads_again() -> None:
    work = Work("a", 1e6, 1e3, download=4.5e8)
    s = named("anna", dropouts_per_day=1, replace_days=3, download_mbit=1)  # an hour of download
    outcome = run_island(island(s, [work]), [work], random.Random(1))
    assert outcome.dropouts > 0
    assert outcome.hours == pytest.approx(outcome.trained / HOUR + 1 + outcome.dropouts)
    assert outcome.days == pytest.approx(outcome.hours / 24 + 3 * outcome.dropouts)


def test_an_island_that_never_reaches_a_checkpoint_is_told() -> None:
    work = Work("a", 1e9, 1e9)
    with pytest.raises(AtollError, match=r"anna.*no progress.*checkpoint_every"):
        run_island(island(named("anna", failures_per_day=100), [work]), [work], random.Random(0))


def test_no_island_for_an_expert() -> None:
    works = [Work("a", 1, 1), Work("3-flow-linear", 1, 1)]
    with pytest.raises(AtollError, match="no island for expert 3-flow-linear"):
        assign(works, [SimulatedIsland(named("anna"), {"a": 1.0})])


def test_quantiles() -> None:
    assert quantile([3.0, 1.0, 2.0], 0.5) == 2.0
    assert quantile([float(i) for i in range(1, 11)], 0.9) == 9.0
    assert quantile([5.0], 0.9) == 5.0


def write(directory: Path, text: str) -> Path:
    file = directory / "islands.yaml"
    file.write_text(text)
    return file


def test_a_file_of_islands(tmp_path: Path) -> None:
    anna, ben = load_islands(
        write(tmp_path, "- {name: anna, gpu: 4090}\n- {name: ben, tflops: 50, memory_gb: 16, experts: [0, 3-eps]}")
    )
    assert (anna.gpu, anna.experts, anna.hours_per_day) == ("4090", "any", 24)
    assert (ben.experts, ben.tflops) == (("0", "3-eps"), 50)
    assert load_islands(write(tmp_path, "islands: [{name: c, gpu: a40, experts: 2}]"))[0].experts == ("2",)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- {name: anna, gpu: a40, hours: 3}", "island anna: unknown key hours; expected one of name, gpu"),
        ("- {name: anna, gpu: a40, hours_per_day: 25}", "island anna: hours_per_day"),
        ("- {name: anna, gpu: a40, failures_per_day: often}", "island anna: failures_per_day"),
        ("- {gpu: a40}", "island 0: name"),
        ("- {name: anna}", "anna: give it either gpu, or tflops and memory_gb"),
        ("- {name: anna, gpu: a40, tflops: 3, memory_gb: 3}", "anna: give it either"),
        ("- {name: anna, tflops: 3}", "anna: give it either"),
        ("- {name: anna, gpu: a40}\n- {name: anna, gpu: a40}", "two islands are called anna"),
        ("name: anna", "expected a list of islands"),
        ("[]", "expected a list of islands"),
        ("- [", "cannot be read"),
    ],
)
def test_mistakes_in_it_are_told_in_one_line(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(AtollError, match=message) as caught:
        load_islands(write(tmp_path, text))
    assert "\n" not in str(caught.value)


@given(text=st.text(max_size=60) | st.sampled_from(["- {1: 2}", "- {name: .nan, gpu: a40}", "- {name: a, gpu: [1]}"]))
def test_any_text_is_islands_or_one_error(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    file = tmp_path_factory.getbasetemp() / "fuzzed.yaml"
    file.write_bytes(text.encode("utf-8", "replace"))
    message = ""
    try:
        load_islands(file)
    except AtollError as error:
        message = str(error)
    assert "\n" not in message


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(AtollError, match="cannot be read"):
        load_islands(tmp_path / "none.yaml")
