"""PRX, SD3, Sana, Lumina2, FLUX and FLUX.2 behind the adapters: times, masks, sizes, precision, bad input."""

from typing import Any

import pytest
import torch
from torch import Tensor

from atoll.condition import Condition
from atoll.errors import AtollError
from atoll.nn import Foreign, build_network
from tests.nn.foreign_small import (
    MASKED,
    POOLED,
    SMALL,
    TEXT,
    TIME_SCALES,
    UNMASKED,
    card_entry,
    condition_for,
    latents,
    small,
)

diffusers = pytest.importorskip("diffusers")

TIMES = torch.tensor([0.0, 0.37, 1.0])


def evaluate(network: Foreign, condition: Condition | None = None, x: Tensor | None = None) -> Tensor:
    x = latents(network) if x is None else x
    condition = condition_for(network) if condition is None else condition
    return network(x, TIMES * TIME_SCALES[network.config.cls], condition)


@pytest.mark.parametrize("cls", SMALL)
def test_every_row_is_computed_at_its_own_time_and_text(cls) -> None:
    """Batches of several times and text lengths equal their rows one by one, without padding."""
    network = small(cls)
    x, condition, times = latents(network), condition_for(network), TIMES * TIME_SCALES[cls]
    together = network(x, times, condition)
    assert together.shape == x.shape
    for row, count in enumerate(condition.mask.sum(1).tolist()):
        pooled = None if condition.pooled is None else condition.pooled[row : row + 1]
        alone = Condition(condition.states[row : row + 1, :count], condition.mask[row : row + 1, :count], pooled)
        got = network(x[row : row + 1], times[row : row + 1], alone)
        torch.testing.assert_close(together[row : row + 1], got, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("cls", MASKED)
def test_masked_text_is_not_read_wherever_it_is(cls) -> None:
    """Padding on the right, on the left, and holes: only the tokens and their order count."""
    network = small(cls)
    g = torch.Generator().manual_seed(5)
    text = torch.randn(3, 3, TEXT, generator=g)
    outputs = []
    for mask in ([1, 1, 1, 0, 0], [0, 0, 1, 1, 1], [1, 0, 1, 0, 1]):
        where = torch.tensor(mask, dtype=torch.bool)
        states = torch.full((3, 5, TEXT), 7.0 + len(outputs))
        states[:, where] = text
        outputs.append(evaluate(network, Condition(states, where.expand(3, 5))))
    torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(outputs[2], outputs[0], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("cls", UNMASKED)
def test_text_that_would_not_be_masked_is_refused(cls) -> None:
    network = small(cls)
    whole = condition_for(network)
    padded = Condition(whole.states, torch.arange(5).expand(3, 5) < 4, whole.pooled)
    with pytest.raises(AtollError, match=f"a mask with padding, which {cls} would read as text; use the text encoder"):
        evaluate(network, padded)


@pytest.mark.parametrize("cls", SMALL)
@pytest.mark.parametrize("how", ["weights", "autocast"])
def test_neighbouring_times_differ_in_bfloat16(cls, how) -> None:
    """diffusers' FLUX and FLUX.2 see 126 of these 501 times, because they round them to bfloat16."""
    network = small(cls)
    exact = evaluate(network)
    x, condition, times = latents(network, 1).expand(501, -1, -1, -1), condition_for(network, 1), TIMES
    times = torch.linspace(0.5, 1, 501)
    # Lumina2 reads times without a factor: in bfloat16 the sines of neighbours coincide at their flat end.
    least = 400 if cls == "Lumina2Transformer2DModel" else 495
    network = network.bfloat16() if how == "weights" else network
    with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
        rounded = evaluate(network)
        outputs = network(x[..., :4, :4], times * TIME_SCALES[cls], condition.index(torch.zeros(501, dtype=torch.long)))
    assert rounded.dtype == torch.float32
    assert (rounded - exact).norm() / exact.norm() < 0.05
    assert len(outputs.flatten(1).unique(dim=0)) >= least


@pytest.mark.parametrize("cls", SMALL)
def test_built_on_the_meta_device_and_in_training_it_computes_the_same(cls) -> None:
    """As every network is loaded: positions that diffusers does not save would have no values there."""
    changes = {"interpolation_scale": 2, "dropout": 0.3} if cls == "SanaTransformer2DModel" else {}
    network = small(cls, **changes)
    with torch.device("meta"):
        other = build_network(network.config.model_dump(mode="json"))
    other.load_state_dict(network.state_dict(), strict=True, assign=True)
    expected = evaluate(network)
    assert torch.equal(evaluate(other.eval()), expected)
    other.train().requires_grad_(True)
    got = evaluate(other)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    got.square().sum().backward()
    assert all(p.grad is not None for p in other.parameters())


@pytest.mark.parametrize("cls", SMALL)
def test_the_card_entry_comes_back(cls) -> None:
    entry = card_entry(cls)
    assert build_network(entry).config.model_dump(mode="json") == entry


def test_the_guidance_that_a_distilled_network_embeds() -> None:
    """FLUX's guidance is a constant of the card; another one is another output."""
    entry = card_entry("FluxTransformer2DModel")
    weights = small("FluxTransformer2DModel").state_dict()
    outputs = []
    for guidance in (1.0, 3.5):
        network = build_network(entry | {"guidance": guidance}).eval().requires_grad_(False)
        network.load_state_dict(weights)
        outputs.append(evaluate(network))
    assert (outputs[0] - outputs[1]).norm() / outputs[0].norm() > 0.01
    del entry["guidance"]
    with pytest.raises(AtollError, match=r"embeds a guidance scale; set guidance, such as guidance: 3\.5"):
        build_network(entry)
    with pytest.raises(AtollError, match=r"guidance 2, but this network embeds none; leave guidance out"):
        build_network(card_entry("FluxTransformer2DModel", guidance_embeds=False) | {"guidance": 2.0})


FLUX, SD3, SANA, PRX = (f"{name}Transformer2DModel" for name in ("Flux", "SD3", "Sana", "PRX"))
LUMINA2 = "Lumina2Transformer2DModel"


@pytest.mark.parametrize(
    ("cls", "size", "message"),
    [
        (FLUX, (7, 8), r"latent: got 7 x 8, FluxTransformer2DModel packs squares of 2 x 2; use sides"),
        (PRX, (8, 9), r"latent: got 8 x 9, PRXTransformer2DModel packs squares of 2 x 2"),
        (SD3, (8, 26), r"got 8 x 26, SD3Transformer2DModel has positions for at most 24 x 24; use a smaller size"),
        (LUMINA2, (34, 8), r"got 34 x 8, Lumina2Transformer2DModel has positions for at most 32 x 32"),
    ],
)
def test_latents_of_another_size_are_refused(cls, size, message) -> None:
    network = small(cls)
    with pytest.raises(AtollError, match=message):
        evaluate(network, x=latents(network, 3, *size))


@pytest.mark.parametrize("cls", SMALL)
def test_conditions_that_do_not_fit_are_refused(cls) -> None:
    network = small(cls)
    whole = condition_for(network)
    wide = Condition(torch.randn(3, 5, TEXT + 1), whole.mask, whole.pooled)
    with pytest.raises(AtollError, match=r"condition states: got 11 wide, expected 10"):
        evaluate(network, wide)
    with pytest.raises(AtollError, match=r"condition: got 2 rows, expected 3"):
        evaluate(network, whole.index(torch.arange(2)))
    with pytest.raises(AtollError, match=r"latent: got shape \[3, \d+, 8, 12\], expected \[B, \d+, 8, 12\]"):
        evaluate(network, x=latents(network)[:, 1:])
    if network.pooled_width is not None:
        with pytest.raises(AtollError, match=rf"pooled vector: got none, expected {POOLED} wide"):
            evaluate(network, Condition(whole.states, whole.mask))


def test_a_kept_network_is_not_sharded() -> None:
    from atoll.train.island import Island

    with pytest.raises(AtollError, match=r"a Foreign has others: set train\.sharding: replicate"):
        Island(0, 2, torch.device("cpu")).wrap(small(PRX), "shard")


def test_more_text_than_lumina2_has_positions_for() -> None:
    network = small(LUMINA2)
    condition = Condition(torch.randn(3, 22, TEXT), torch.arange(22).expand(3, 22) < 20)
    with pytest.raises(AtollError, match=r"got 20 tokens, Lumina2Transformer2DModel reads at most 19"):
        evaluate(network, condition)
    evaluate(network, Condition(condition.states, torch.arange(22).expand(3, 22) < 19))


@pytest.mark.parametrize(
    ("cls", "changes", "message"),
    [
        (PRX, {"size": None}, r"no size of the latents; set size: \[height, width\]"),
        (PRX, {"pixels": [64, 64]}, r"pixels \[64, 64\], but it reads no image's size"),
        (PRX, {"config": {"axes_dim": [4, 6]}}, r"cannot be built from its config"),
        (PRX, {"config": {"axes_dim": [4] * 600}}, r"axes_dim"),
        (PRX, {"config": {"depth": 513}}, r"depth 513; expected at most 512"),
        (FLUX, {"config": {"num_single_layers": 10**6}}, r"num_single_layers"),
        (FLUX, {"config": {"out_channels": 8}}, r"8 channels out, 16 in"),
        (
            FLUX,
            {"config": {"in_channels": 18}},
            r"in_channels 18, .*expected patch_size 1, a multiple of 4, and 3 axes",
        ),
        (FLUX, {"config": {"patch_size": 2}}, r"patch_size 2, "),
        (FLUX, {"config": {"axes_dims_rope": [6, 6]}}, r"axes_dims_rope \[6, 6\]; .*3 axes"),
        (SANA, {"config": {"guidance_embeds": True}, "guidance": 4.0}, r"belongs to Sana-Sprint"),
        (SD3, {"config": {"pos_embed_max_size": 1000}}, r"pos_embed_max_size 1000; expected at most 512"),
        (
            SD3,
            {"config": {"pos_embed_max_size": 512, "attention_head_dim": 9000}},
            r"a table of 4,718,592,000 positions",
        ),
        (LUMINA2, {"config": {"axes_lens": [20, 65536, 16], "axes_dim_rope": [4, 65536, 4]}}, r"a table of 4,294,967"),
    ],
    ids=str,
)
def test_configurations_that_cannot_work_are_refused_in_one_line(cls, changes, message) -> None:
    entry: dict[str, Any] = card_entry(cls)
    entry |= changes | {"config": entry["config"] | changes.get("config", {})}
    with torch.device("meta"), pytest.raises(AtollError, match=message) as raised:
        build_network(entry)
    assert "\n" not in str(raised.value)
