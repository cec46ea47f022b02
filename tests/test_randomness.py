"""Random streams: fixed for good, independent of what ran before and of how rows are batched."""

import itertools

import torch

from atoll.randomness import (
    ShuffledPasses,
    Stream,
    cpu_generator,
    hashed_seed,
    random_rows,
    seeded,
    seeded_noise,
)


def test_seeds_of_streams_never_change() -> None:
    assert seeded(0, 0).initial_seed() == 0
    assert seeded(2, 5, Stream.VALIDATION).initial_seed() == (2 * 1_000_003 + 5) * 16 + 12
    assert seeded(2**62, 1).initial_seed() == (2**62 * 1_000_003 + 1) * 16 % 2**63
    assert hashed_seed("noise", 3, 2) == 1_419_347_388


def test_streams_do_not_overlap() -> None:
    seeds = {seeded(1, index, stream).initial_seed() for index in range(50) for stream in Stream}
    assert len(seeds) == 50 * len(Stream)
    assert max(Stream) < 16


def test_a_row_of_noise_does_not_depend_on_its_batch() -> None:
    together = seeded_noise([5, 6, 7], (1, 3, 4))
    assert torch.equal(together[1:2], seeded_noise([6], (1, 3, 4)))
    assert not torch.equal(together[0], together[1])


def test_random_rows_are_different_and_at_most_all() -> None:
    rows = random_rows(10, 4, cpu_generator(0))
    assert len(set(rows.tolist())) == 4
    assert sorted(random_rows(3, 9, cpu_generator(0)).tolist()) == [0, 1, 2]


def test_each_pass_has_every_item_once_in_its_own_order() -> None:
    passes = ShuffledPasses(7, cpu_generator)
    first, second = passes.items(0, 7), passes.items(7, 14)
    assert sorted(first.tolist()) == sorted(second.tolist()) == list(range(7))
    assert not torch.equal(first, second)


def test_items_do_not_depend_on_how_they_are_read() -> None:
    whole = ShuffledPasses(7, cpu_generator).items(0, 40)
    passes = ShuffledPasses(7, cpu_generator)
    for start, stop in itertools.chain([(33, 40), (3, 4)], itertools.pairwise(range(0, 41, 5))):
        assert torch.equal(passes.items(start, stop), whole[start:stop])
