"""Conditions and their encoders; CLIP and T5 are transformers' own classes, small and random."""

import hashlib
import json
import shutil
import socket
import struct
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from atoll.condition import Condition
from atoll.encoders.text import HashEncoder, LabelEncoder, PromptEncoder, build_encoder
from atoll.encoders.weights import identity
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


def test_word_vectors_have_unit_variance_and_no_correlation() -> None:
    encoder = HashEncoder(dim=512, length=4)
    encoded = encoder(["moss", "mosses"]).states[:, 1]
    word = encoded - HashEncoder(dim=512, length=4)._position[1]
    assert word.std(1).sub(1).abs().max() < 0.1
    assert abs(torch.nn.functional.cosine_similarity(*word, dim=0)) < 0.2


def test_one_thread_may_encode_while_another_tokenizes() -> None:
    """While one batch is encoded, on a device, the next is tokenized: its new words must not be lost."""
    encoder = HashEncoder(dim=10, length=7)
    encoder.encode(encoder.tokenize(["moss"]).to("meta"))
    late = encoder.tokenize(["sand and rain"])
    encoder.encode(encoder.tokenize(["moss"]).to("meta"))
    torch.testing.assert_close(encoder.encode(late).states, HashEncoder(dim=10, length=7)(["sand and rain"]).states)


def test_word_order_changes_the_states_and_not_the_pooled_vector() -> None:
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


def test_encoding_does_not_depend_on_earlier_captions() -> None:
    fresh, used = HashEncoder(), HashEncoder()
    used(["many other words came first", "a serif"])
    a, b = fresh(CAPTIONS), used(CAPTIONS)
    assert torch.equal(a.states, b.states)
    torch.testing.assert_close(a.pooled, b.pooled)


def test_word_vectors_are_the_same_on_every_machine() -> None:
    """Experts are trained on these very numbers: another vector for a word breaks every artifact."""
    encoder = HashEncoder(dim=4, length=2)
    word = encoder(["omega"]).states[0, 1] - encoder._position[1]
    bits = struct.unpack("<4I", hashlib.shake_256(b"0:omega").digest(16))
    assert bits[0] == 2363406004
    torch.testing.assert_close(word, torch.tensor([(b / 2**31 - 1) * 3**0.5 for b in bits]), rtol=0, atol=1e-6)


def test_different_seeds_give_different_vectors() -> None:
    assert not torch.allclose(HashEncoder(seed=0)(["a"]).states, HashEncoder(seed=1)(["a"]).states)


def test_tokens_of_a_data_set_are_encoded_row_by_row() -> None:
    encoder = HashEncoder()
    tokens = encoder.tokenize(CAPTIONS)
    rows = torch.tensor([2, 0, 2])
    encoded, whole = encoder.encode(tokens.index(rows)), encoder(CAPTIONS)
    assert len(tokens) == 3
    assert torch.equal(encoded.states, whole.states[rows])
    assert torch.equal(encoded.mask, whole.mask[rows])


def test_the_null_condition_is_the_empty_prompt() -> None:
    encoder = HashEncoder()
    assert torch.equal(encoder.null(2).states, encoder(["", ""]).states)
    assert encoder.null(2).mask.any(1).all()


@given(st.lists(st.text(), min_size=1, max_size=5))
def test_any_text_gives_finite_states_and_a_token(captions) -> None:
    encoded = HashEncoder(dim=4, length=5)(captions)
    assert encoded.mask.any(1).all()
    assert encoded.states.isfinite().all()
    assert encoded.pooled.isfinite().all()


def test_conditions_are_indexed_joined_and_moved() -> None:
    whole = condition()
    parts = [whole.index(torch.tensor([0])), whole.index(torch.tensor([False, True, True]))]
    joined = Condition.cat(parts)
    assert len(parts[1]) == 2
    for name in ("states", "mask", "pooled"):
        assert torch.equal(getattr(joined, name), getattr(whole, name))
    cast = whole.to("cpu", torch.float64)
    assert (cast.states.dtype, cast.mask.dtype, cast.pooled.dtype) == (torch.float64, torch.bool, torch.float64)
    assert Condition.cat([condition(pooled=0)] * 2).pooled is None


def test_a_condition_refuses_shapes_that_do_not_fit() -> None:
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
    ("config", "message"),
    [
        ({"name": "clap"}, "'clap'.*'hash'"),
        ({}, "None.*'hash'"),
        ({"name": "hash", "dims": 4}, "dims"),
        ({"name": "hash", "dim": 3}, "dim.*multiple of 2"),
        ({"name": "hash", "length": 1}, "length"),
    ],
)
def test_build_encoder_refuses_bad_configs(config, message) -> None:
    with pytest.raises(AtollError, match=message):
        build_encoder(config)


@pytest.fixture
def no_network(monkeypatch) -> None:
    """Whatever is local is loaded without the hub and without a connection."""

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("the network was touched")

    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.delenv("ATOLL_WEIGHTS", raising=False)


def save_clip_tokenizer(path: Path, whole: bool = False) -> int:
    """CLIP's byte-level BPE with the merges of "red" and "moss"; the size of its vocabulary."""
    from tokenizers.pre_tokenizers import ByteLevel

    letters = sorted(ByteLevel.alphabet())
    merges = [("r", "e"), ("re", "d</w>"), ("m", "o"), ("mo", "s"), ("mos", "s</w>")]
    words = [*letters, *(letter + "</w>" for letter in letters), *("".join(pair) for pair in merges)]
    vocabulary = {word: i for i, word in enumerate([*words, "<|startoftext|>", "<|endoftext|>"])}
    path.mkdir(parents=True, exist_ok=True)
    if whole:
        from transformers import CLIPTokenizer

        CLIPTokenizer(vocabulary, merges).save_pretrained(path)
    else:
        (path / "vocab.json").write_text(json.dumps(vocabulary))
        (path / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges))
    return len(vocabulary)


def save_clip(path: Path, kind: str = "text", end: int | None = None, words: int = 0) -> Path:
    """A CLIP of width 16 with 11 positions, or its text half ("text"), with the tokenizer beside it."""
    import transformers

    size = words or save_clip_tokenizer(path)
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    end = size - 1 if end is None else end
    tokens = {"bos_token_id": size - 2, "eos_token_id": end, "pad_token_id": 1, "vocab_size": size}
    text = {**sizes, **tokens, "max_position_embeddings": 11, "projection_dim": 10}
    if kind == "text":
        network = transformers.CLIPTextModelWithProjection(transformers.CLIPTextConfig(**text))
    else:
        vision = {**sizes, "image_size": 14, "patch_size": 7, "projection_dim": 10}
        network = transformers.CLIPModel(
            transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=10)
        )
    for parameter in network.parameters():  # fresh ones are so small that nothing would be told apart
        torch.nn.init.normal_(parameter, std=0.3)
    network.save_pretrained(path)
    return path


def save_t5(path: Path) -> Path:
    """A T5 encoder of width 16 with a Unigram tokenizer of ten pieces."""
    import transformers

    torch.manual_seed(0)
    sizes = {"vocab_size": 16, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2}
    transformers.T5EncoderModel(transformers.T5Config(**sizes)).save_pretrained(path)
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0), ("▁red", -1.0), ("▁moss", -1.0)]
    transformers.T5Tokenizer([*pieces, *((c, -3.0) for c in "redsmo")], extra_ids=0).save_pretrained(path)
    return path


SAVE = {"clip": save_clip, "t5": save_t5}
SHORT, LONG = "red moss", "red moss red moss red moss red moss red moss red moss"


@pytest.mark.parametrize("kind", ["text", "whole"])
@pytest.mark.parametrize("end", [None, 2])  # 2 is what OpenAI's own files say
def test_clip_equals_transformers(tmp_path, no_network, kind, end) -> None:
    import transformers

    path = save_clip(tmp_path, kind, end)
    encoder = build_encoder({"name": "clip", "weights": str(path)})
    direct = transformers.CLIPTextModelWithProjection.from_pretrained(path)
    captions = [SHORT, "", LONG]
    tokens = encoder.tokenize(captions)
    encoded = encoder.encode(tokens)
    assert (encoder.length, encoder.dim, encoder.pooled_dim) == (11, 16, 16)
    assert encoded.states.shape == (3, 11, 16)
    size = direct.config.vocab_size
    assert tokens.ids[0].tolist() == [size - 2, size - 6, size - 3, *[size - 1] * 8]  # start, red, moss, end
    assert tokens.mask.sum(1).tolist() == [4, 2, 11]
    assert tokens.ids[2, -1] == size - 1  # cut, and still closed
    with torch.no_grad():
        expected = direct(tokens.ids)
        last = expected.last_hidden_state
    torch.testing.assert_close(encoded.states, last)
    torch.testing.assert_close(encoded.pooled, last[torch.arange(3), torch.tensor([3, 1, 10])])
    projected = build_encoder({"name": "clip", "weights": str(path), "pooled": "projected"})
    torch.testing.assert_close(projected(captions).pooled, expected.text_embeds)
    assert projected.pooled_dim == 10


def test_clip_with_a_tokenizer_file_and_a_length(tmp_path, no_network) -> None:
    size = save_clip_tokenizer(tmp_path / "tokenizer", whole=True)
    save_clip(tmp_path / "text_encoder", words=size)
    save_clip(tmp_path / "flat")
    shutil.copytree(tmp_path / "text_encoder", tmp_path / "flat", dirs_exist_ok=True)
    flat = build_encoder({"name": "clip", "weights": str(tmp_path / "flat"), "length": 5})
    folders = {"subfolder": "text_encoder", "tokenizer": "tokenizer"}
    apart = build_encoder({"name": "clip", "weights": str(tmp_path), "length": 5, **folders})
    assert flat([SHORT, LONG]).states.shape == (2, 5, 16)
    assert torch.equal(flat([SHORT, LONG]).states, apart([SHORT, LONG]).states)
    with pytest.raises(AtollError, match=r"length 12, but the network has 11 positions"):
        build_encoder({"name": "clip", "weights": str(tmp_path / "flat"), "length": 12})


def test_t5_equals_transformers(tmp_path, no_network) -> None:
    import transformers

    path = save_t5(tmp_path)
    encoder = build_encoder({"name": "t5", "weights": str(path), "length": 7})
    captions = [SHORT, "", LONG]
    tokens = encoder.tokenize(captions)
    encoded = encoder.encode(tokens)
    assert (encoder.length, encoder.dim, encoder.pooled_dim, encoded.pooled) == (7, 16, None, None)
    assert tokens.ids[:2].tolist() == [[4, 5, 1, 0, 0, 0, 0], [1, 0, 0, 0, 0, 0, 0]]
    assert tokens.mask.sum(1).tolist() == [3, 1, 7]
    direct = transformers.T5EncoderModel.from_pretrained(path)
    with torch.no_grad():
        expected = direct(tokens.ids, attention_mask=tokens.mask).last_hidden_state
        torch.testing.assert_close(encoded.states, expected)
        alone = direct(tokens.ids[:1, :3]).last_hidden_state  # what is padded does not count
    torch.testing.assert_close(encoded.states[:1, :3], alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", SAVE)
def test_text_encoders_are_frozen_and_usable_in_training(tmp_path, no_network, name) -> None:
    encoder = build_encoder({"name": name, "weights": str(SAVE[name](tmp_path)), "length": 6})
    tokens = encoder.tokenize([SHORT, "", LONG])
    whole = encoder.encode(tokens)
    assert not whole.states.requires_grad
    layer = torch.nn.Linear(16, 2)
    layer(whole.states).sum().backward()  # autograd keeps the states
    assert layer.weight.grad is not None
    rows = torch.tensor([2, 0])
    torch.testing.assert_close(encoder.encode(tokens.index(rows)).states, whole.states[rows])
    torch.testing.assert_close(encoder.null(2).states[0], encoder([""]).states[0])
    assert whole.mask.any(1).all()
    assert encoder.tokenize([]).ids.shape == encoder.tokenize([]).mask.shape == (0, 6)


@pytest.mark.parametrize("name", SAVE)
def test_half_precision_gives_float32_states(tmp_path, no_network, name) -> None:
    config = {"name": name, "weights": str(SAVE[name](tmp_path)), "length": 6}
    full, half = (build_encoder({**config, "precision": p})([SHORT, LONG]) for p in ("fp32", "bf16"))
    assert full.states.dtype == half.states.dtype == torch.float32
    assert 0 < (full.states - half.states).abs().max() < 0.1 * full.states.abs().max()


@pytest.mark.parametrize("name", SAVE)
def test_an_encoder_is_built_from_its_card_on_another_machine(tmp_path, no_network, name) -> None:
    encoder = build_encoder({"name": name, "weights": str(SAVE[name](tmp_path / "here")), "length": 6})
    card = json.loads(json.dumps(encoder.config()))
    shutil.move(tmp_path / "here", tmp_path / "there")
    again = build_encoder({**card, "weights": str(tmp_path / "there")})
    assert identity(again.config()) == identity(card)
    assert torch.equal(again([SHORT]).states, encoder([SHORT]).states)
    (tmp_path / "there" / "tokenizer_config.json").write_text("{ }")
    with pytest.raises(AtollError, match=r"have sha256 .*, the config expects"):
        build_encoder({**card, "weights": str(tmp_path / "there")})


@given(st.lists(st.text(), min_size=1, max_size=4))
def test_clip_tokenizes_any_text(clip_encoder, captions) -> None:
    encoded = clip_encoder(captions)
    assert encoded.mask.any(1).all()
    assert encoded.states.isfinite().all()
    assert encoded.states.shape == (len(captions), 11, 16)


@pytest.fixture(scope="module")
def clip_encoder(tmp_path_factory):
    return build_encoder({"name": "clip", "weights": str(save_clip(tmp_path_factory.mktemp("clip")))})


def test_a_tokenizer_of_another_network_is_refused(tmp_path, no_network) -> None:
    save_clip(tmp_path / "small", words=40)
    size = save_clip_tokenizer(tmp_path / "small")
    with pytest.raises(AtollError, match=rf"tokenizer has {size} tokens, the network .* 40"):
        build_encoder({"name": "clip", "weights": str(tmp_path / "small")})
    save_clip(tmp_path / "end", end=7)
    with pytest.raises(AtollError, match=rf"end token is 7, the tokenizer's {size - 1}"):
        build_encoder({"name": "clip", "weights": str(tmp_path / "end")})
    save_t5(tmp_path / "t5")
    with pytest.raises(AtollError, match=r"says 't5'; expected one of clip"):
        build_encoder({"name": "clip", "weights": str(tmp_path / "t5")})


def test_a_missing_or_damaged_tokenizer_is_refused(tmp_path, no_network, monkeypatch) -> None:
    path = save_t5(tmp_path)
    (path / "tokenizer.json").write_text("{")
    with pytest.raises(AtollError, match=r"its tokenizer cannot be loaded"):
        build_encoder({"name": "t5", "weights": str(path)})
    (path / "tokenizer.json").unlink()
    with pytest.raises(AtollError, match=r"no tokenizer; expected tokenizer.json"):
        build_encoder({"name": "t5", "weights": str(path)})
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(AtollError, match=r"pip install 'atoll\[hub\]'"):
        build_encoder({"name": "clip", "weights": str(save_clip_tokenizer(path) and path)})


def test_labels_are_one_hot_and_the_null_condition_zero(tmp_path) -> None:
    encoder = build_encoder({"name": "label", "labels": ["moss", "sand", "red rust"]})
    encoded = encoder(["red rust", "", " moss "])
    assert (encoder.dim, encoder.pooled_dim, encoder.length) == (3, 3, 1)
    assert encoded.states.tolist() == [[[0, 0, 1]], [[0, 0, 0]], [[1, 0, 0]]]
    assert torch.equal(encoded.pooled, encoded.states[:, 0])
    assert encoded.mask.all()
    assert torch.equal(encoder.null(2).states, torch.zeros(2, 1, 3))
    assert encoder([]).states.shape == (0, 1, 3)


def test_labels_from_a_file_are_stored_in_the_card(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("HERE", str(tmp_path))
    (tmp_path / "labels.txt").write_text("moss\n\nred rust \nMöwe\n", encoding="utf-8-sig")
    encoder = build_encoder({"name": "label", "labels": "$HERE/labels.txt"})
    assert encoder.config() == {"name": "label", "labels": ["moss", "red rust", "Möwe"]}
    (tmp_path / "labels.txt").unlink()
    assert build_encoder(encoder.config()).config() == encoder.config()
    with pytest.raises(AtollError, match=r"labels\.txt cannot be read.*one label a line"):
        build_encoder({"name": "label", "labels": "$HERE/labels.txt"})


def test_a_number_of_labels_calls_them_by_their_numbers() -> None:
    encoder = build_encoder({"name": "label", "labels": 12})
    assert encoder.config() == {"name": "label", "labels": list(map(str, range(12)))}
    assert encoder(["11"]).states[0, 0].argmax() == 11
    for wrong in (0, True, 70_000, 2.5):
        with pytest.raises(AtollError, match="labels"):
            build_encoder({"name": "label", "labels": wrong})


def test_unknown_labels_are_refused_with_the_nearest() -> None:
    encoder = LabelEncoder(["grey moss", "sand", "rust"])
    with pytest.raises(AtollError, match=r"'gray mos' is none of the 3 labels; the nearest is 'grey moss'"):
        encoder.tokenize(["sand", "gray mos"])
    with pytest.raises(AtollError, match=r"none of the 3 labels"):
        encoder.tokenize(["Ω"])


@pytest.mark.parametrize(
    ("labels", "message"), [([], "no labels"), (["a", " "], "empty label"), (["a", "b", "a "], "'a' is repeated")]
)
def test_missing_empty_and_repeated_labels_are_refused(labels, message) -> None:
    with pytest.raises(AtollError, match=message):
        build_encoder({"name": "label", "labels": labels})


def test_the_truncated_text_of_a_long_caption() -> None:
    encoder = HashEncoder(dim=8, length=4)
    assert encoder.truncated_text("moss, sand rain") == ""
    assert encoder.truncated_text("moss, Sand rain RUST; fern") == "rust fern"
    shorter, longer = HashEncoder(dim=8, length=3), HashEncoder(dim=6, length=9)
    assert PromptEncoder([longer, shorter]).truncated_text("moss sand rain") == "rain"
    assert LabelEncoder(("moss", "sand")).truncated_text("moss") == ""


def test_the_truncated_text_of_clip(clip_encoder) -> None:
    words = list("abcdefghijklmnopqrstuvwxyz")
    caption = " ".join(words * 8)
    rest = clip_encoder.truncated_text(caption)
    read = caption.replace(" ", "")[: -len(rest.replace(" ", ""))]
    assert rest
    assert clip_encoder.truncated_text(" ".join(read)) == ""
    tokens = clip_encoder.tokenize([caption]).ids
    torch.testing.assert_close(tokens, clip_encoder.tokenize([" ".join(read)]).ids)
    assert clip_encoder.truncated_text("") == ""
