import hashlib
import struct

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from atoll.condition import Condition, HashEncoder, build_encoder
from atoll.errors import AtollError

CAPTIONS = ["latin small letter a, serif", "", "digit seven, sans bold italic"]


def condition(batch=3, length=5, dim=4, pooled=6) -> Condition:
    mask = torch.arange(length) <= torch.arange(batch).unsqueeze(1)
    return Condition(torch.randn(batch, length, dim), mask, torch.randn(batch, pooled) if pooled else None)


def test_hash_shapes_and_mask() -> None:
    encoder = HashEncoder(dim=10, length=7)
    encoded = encoder(CAPTIONS)
    assert encoded.states.shape == (3, 7, encoder.dim)
    assert encoded.pooled.shape == (3, encoder.pooled_dim)
    # A start token, then the words; the last caption has five words.
    assert encoded.mask.sum(1).tolist() == [6, 1, 6]
    assert (encoded.states[~encoded.mask] == 0).all()
    torch.testing.assert_close(encoded.pooled.square().mean(1), torch.ones(3))


def test_words_have_unit_variance_and_no_likeness() -> None:
    encoder = HashEncoder(dim=512, length=4)
    encoded = encoder(["moss", "mosses"]).states[:, 1]
    word = encoded - HashEncoder(dim=512, length=4)._position[1]
    assert word.std(1).sub(1).abs().max() < 0.1
    assert abs(torch.nn.functional.cosine_similarity(*word, dim=0)) < 0.2


def test_position_tells_the_order_of_words_in_the_states_only() -> None:
    one, other = HashEncoder()(["red on blue", "blue on red"]).index(torch.tensor([0, 1])).states
    assert not torch.allclose(one, other)
    pooled = HashEncoder()(["red on blue", "blue on red"]).pooled
    torch.testing.assert_close(pooled[0], pooled[1])


def test_case_and_punctuation_do_not_matter() -> None:
    states = HashEncoder()(["Latin SMALL letter-a,  serif!", "latin small letter a serif"]).states
    assert torch.equal(states[0], states[1])


def test_long_captions_are_cut() -> None:
    encoder = HashEncoder(length=3)
    assert torch.equal(encoder(["one two three"]).states, encoder(["one two four"]).states)


def test_encoding_does_not_depend_on_what_was_met_before() -> None:
    fresh, used = HashEncoder(), HashEncoder()
    used(["many other words came first", "a serif"])
    a, b = fresh(CAPTIONS), used(CAPTIONS)
    assert torch.equal(a.states, b.states)
    torch.testing.assert_close(a.pooled, b.pooled)


def test_vectors_never_change() -> None:
    """Experts are trained on these very numbers: another vector for a word breaks every artifact."""
    encoder = HashEncoder(dim=4, length=2)
    word = encoder(["omega"]).states[0, 1] - encoder._position[1]
    bits = struct.unpack("<4I", hashlib.shake_256(b"0:omega").digest(16))
    assert bits[0] == 2363406004
    torch.testing.assert_close(word, torch.tensor([(b / 2**31 - 1) * 3**0.5 for b in bits]), rtol=0, atol=1e-6)


def test_seeds_differ() -> None:
    assert not torch.allclose(HashEncoder(seed=0)(["a"]).states, HashEncoder(seed=1)(["a"]).states)


def test_tokens_of_a_data_set_are_encoded_row_by_row() -> None:
    encoder = HashEncoder()
    tokens = encoder.tokenize(CAPTIONS)
    rows = torch.tensor([2, 0, 2])
    encoded, whole = encoder.encode(tokens.index(rows)), encoder(CAPTIONS)
    assert len(tokens) == 3
    assert torch.equal(encoded.states, whole.states[rows])
    assert torch.equal(encoded.mask, whole.mask[rows])


def test_null_is_the_empty_prompt() -> None:
    encoder = HashEncoder()
    assert torch.equal(encoder.null(2).states, encoder(["", ""]).states)
    assert encoder.null(2).mask.any(1).all()


@given(st.lists(st.text(), min_size=1, max_size=5))
def test_any_text_gives_finite_states_and_a_token(captions) -> None:
    encoded = HashEncoder(dim=4, length=5)(captions)
    assert encoded.mask.any(1).all()
    assert encoded.states.isfinite().all()
    assert encoded.pooled.isfinite().all()


def test_condition_index_cat_to() -> None:
    whole = condition()
    parts = [whole.index(torch.tensor([0])), whole.index(torch.tensor([False, True, True]))]
    joined = Condition.cat(parts)
    assert len(parts[1]) == 2
    for name in ("states", "mask", "pooled"):
        assert torch.equal(getattr(joined, name), getattr(whole, name))
    cast = whole.to("cpu", torch.float64)
    assert (cast.states.dtype, cast.mask.dtype, cast.pooled.dtype) == (torch.float64, torch.bool, torch.float64)
    assert Condition.cat([condition(pooled=0)] * 2).pooled is None


def test_condition_refuses_what_does_not_belong_together() -> None:
    whole = condition()
    with pytest.raises(ValueError, match="bool mask"):
        Condition(whole.states, whole.mask.float())
    with pytest.raises(ValueError, match="mask"):
        Condition(whole.states, whole.mask[:, :-1])
    with pytest.raises(ValueError, match=r"pooled must be \[3,P\]"):
        Condition(whole.states, whole.mask, torch.zeros(2, 6))
    with pytest.raises(ValueError, match="some have none"):
        Condition.cat([condition(), condition(pooled=0)])


def test_build_encoder_round_trip() -> None:
    encoder = HashEncoder(dim=6, length=9, seed=4)
    again = build_encoder(encoder.config())
    assert again.config() == encoder.config() == {"name": "hash", "dim": 6, "length": 9, "seed": 4}
    assert torch.equal(again(CAPTIONS).states, encoder(CAPTIONS).states)
    assert build_encoder({"name": "hash"}).config() == {"name": "hash", "dim": 64, "length": 16, "seed": 0}


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"name": "clap"}, "'clap'.*'hash'"),
        ({}, "None.*'hash'"),
        ({"name": "hash", "dims": 4}, "dims"),
        ({"name": "hash", "dim": 3}, "dim.*multiple of 2"),
        ({"name": "hash", "length": 1}, "length"),
    ],
)
def test_build_encoder_refuses(config, said) -> None:
    with pytest.raises(AtollError, match=said):
        build_encoder(config)
