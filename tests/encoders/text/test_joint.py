"""SD3's three text encoders and FLUX's two against what the diffusers pipelines' own encode_prompt returns."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor

from atoll.encoders.text import PromptEncoder, build_encoder
from atoll.errors import AtollError
from tests.encoders.text.test_text import LONG, SHORT, save_clip

diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")

CAPTIONS = [SHORT, "", LONG]


def save_wide_t5(path: Path) -> None:
    """A T5 as wide as both CLIPs, or wider, with a Unigram tokenizer of ten pieces."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 16, "d_model": 40, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2}
    network = transformers.T5EncoderModel(transformers.T5Config(**sizes))
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    network.save_pretrained(path)
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0), ("▁red", -1.0), ("▁moss", -1.0)]
    transformers.T5Tokenizer([*pieces, *((c, -3.0) for c in "redsmo")], extra_ids=0).save_pretrained(path)


def split(path: Path, number: str) -> None:
    """Move a network's tokenizer to a folder of its own, as pipelines have it."""
    tokenizer = path.parent / f"tokenizer{number}"
    tokenizer.mkdir()
    for file in path.iterdir():
        if file.name not in ("config.json", "model.safetensors"):
            shutil.move(file, tokenizer / file.name)


@pytest.fixture(scope="module")
def sd3(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("sd3")
    save_clip(root / "text_encoder")
    save_clip(root / "text_encoder_2")
    network = transformers.CLIPTextModelWithProjection.from_pretrained(root / "text_encoder_2")
    with torch.no_grad():  # both are made of one seed
        for parameter in network.parameters():
            parameter.mul_(-0.7)
    network.save_pretrained(root / "text_encoder_2")
    save_wide_t5(root / "text_encoder_3")
    for number in ("", "_2", "_3"):
        split(root / f"text_encoder{number}", number)
    # CLIP-G's tokenizer pads with another token than CLIP-L's.
    second = transformers.CLIPTokenizer.from_pretrained(root / "tokenizer_2", pad_token="!")
    second.save_pretrained(root / "tokenizer_2")
    return root


@pytest.fixture(scope="module")
def flux(sd3, tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("flux")
    for folder, source in (("text_encoder", "text_encoder"), ("text_encoder_2", "text_encoder_3")):
        shutil.copytree(sd3 / source, root / folder)
    shutil.copytree(sd3 / "tokenizer", root / "tokenizer")
    shutil.copytree(sd3 / "tokenizer_3", root / "tokenizer_2")
    return root


def clip(root: Path, number: str, cls: str):
    tokenizer = transformers.CLIPTokenizer.from_pretrained(root / f"tokenizer{number}", model_max_length=11)
    return getattr(transformers, cls).from_pretrained(root / f"text_encoder{number}").eval(), tokenizer


def t5(root: Path, number: str):
    tokenizer = transformers.T5Tokenizer.from_pretrained(root / f"tokenizer{number}")
    return transformers.T5EncoderModel.from_pretrained(root / f"text_encoder{number}").eval(), tokenizer


def theirs(root: Path, name: str) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        if name == "sd3":
            cls = "CLIPTextModelWithProjection"
            parts = [*clip(root, "", cls), *clip(root, "_2", cls), *t5(root, "_3")]
            pipeline = diffusers.StableDiffusion3Pipeline(None, None, None, *parts)
            text = pipeline.encode_prompt(CAPTIONS, None, None, torch.device("cpu"), max_sequence_length=14)
            return text[0], text[2]
        pipeline = diffusers.FluxPipeline(None, None, *clip(root, "", "CLIPTextModel"), *t5(root, "_2"), None)
        return pipeline.encode_prompt(CAPTIONS, None, torch.device("cpu"), max_sequence_length=14)[:2]


@pytest.mark.parametrize(("name", "length"), [("sd3", 11 + 14), ("flux", 14)])
def test_states_and_pooled_vectors_are_those_of_the_pipelines(name, length, request) -> None:
    root = request.getfixturevalue(name)
    encoder = build_encoder({"name": name, "weights": str(root), "length": 14})
    tokens = encoder.tokenize(CAPTIONS)
    got = encoder.encode(tokens)
    states, pooled = theirs(root, name)
    assert got.states.shape == (3, length, 40) == (3, encoder.length, encoder.dim)
    assert got.pooled is not None
    assert got.pooled.shape == (3, encoder.pooled_dim)
    assert got.mask.all()  # padding is read, as in training
    torch.testing.assert_close(got.states, states, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(got.pooled, pooled, rtol=1e-4, atol=1e-5)
    # Rows alone, and beside another encoder.
    rows = torch.tensor([2, 0])
    torch.testing.assert_close(encoder.encode(tokens.index(rows)).states, got.states[rows])
    pair = PromptEncoder([build_encoder({"name": "hash", "dim": 4}), encoder])
    torch.testing.assert_close(pair(CAPTIONS)[1].pooled, got.pooled)
    assert encoder.tokenize([]).ids.shape == (0, encoder.token_length)


@pytest.mark.parametrize("name", ["sd3", "flux"])
def test_a_card_names_all_networks_by_one_hash(name, request, tmp_path) -> None:
    root = request.getfixturevalue(name)
    card = json.loads(json.dumps(build_encoder({"name": name, "weights": str(root), "length": 14}).config()))
    shutil.copytree(root, tmp_path / "there")
    card |= {"weights": str(tmp_path / "there")}
    assert torch.equal(
        build_encoder(card)([SHORT]).states, build_encoder(card | {"weights": str(root)})([SHORT]).states
    )
    # Another tokenizer, or another of the networks, is noticed.
    (tmp_path / "there" / "tokenizer_2" / "tokenizer_config.json").write_text("{ }")
    with pytest.raises(AtollError, match=rf"condition encoder '{name}': the weights at .* have sha256"):
        build_encoder(card)
    shutil.rmtree(tmp_path / "there" / "text_encoder_2")
    with pytest.raises(AtollError, match=r"text_encoder_2: no model\.safetensors"):
        build_encoder(card)


def test_what_no_network_reads_is_named(sd3) -> None:
    """CLIP reads 9 words and T5 13: what T5 reads is not cut off."""
    encoder = build_encoder({"name": "sd3", "weights": str(sd3), "length": 14})
    assert encoder.truncated_text("red " * 12) == ""
    assert encoder.truncated_text("red " * 15 + "moss").split() == ["red", "red", "moss"]
    assert encoder.truncated_text("r" * (encoder.uncut_bytes - 1)) == ""


def test_parts_of_different_pipelines_are_refused(sd3, tmp_path) -> None:
    shutil.copytree(sd3, tmp_path / "mixed")
    network = transformers.T5EncoderModel(
        transformers.T5Config(vocab_size=16, d_model=24, d_kv=8, d_ff=24, num_layers=1, num_heads=2)
    )
    network.save_pretrained(tmp_path / "mixed" / "text_encoder_3")
    with pytest.raises(AtollError, match=r"CLIPs of 16 and 16 in 11 and 11 positions, T5 24 wide; get all three"):
        build_encoder({"name": "sd3", "weights": str(tmp_path / "mixed")})
    with pytest.raises(AtollError, match=r"says 't5'; expected one of clip"):
        build_encoder({"name": "sd3", "weights": str(_swapped(sd3, tmp_path / "swapped"))})
    with pytest.raises(AtollError, match=r"condition encoder 'flux': subfolder: Extra inputs are not permitted"):
        build_encoder({"name": "flux", "weights": str(sd3), "subfolder": "text_encoder"})


def _swapped(sd3: Path, root: Path) -> Path:
    shutil.copytree(sd3, root)
    (root / "text_encoder_2").rename(root / "other")
    (root / "text_encoder_3").rename(root / "text_encoder_2")
    (root / "other").rename(root / "text_encoder_3")
    return root
