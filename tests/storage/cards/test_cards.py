"""Cards: what is written is read bit for bit; what a stranger may write is bounded, and refused in one line."""

import copy
import json
import os
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from atoll.errors import AtollError
from atoll.storage import bounds
from atoll.storage.artifact import load_card, read_json, write_card
from atoll.storage.cards import (
    Card,
    CardRecord,
    ClustersCard,
    ClusterShardsCard,
    DrawingPlan,
    DrawnClustersCard,
    EncodedCard,
    EncodingPlan,
    EnsembleCard,
    ExpertCard,
    LoraCard,
    ReportRowsCard,
    RouterCard,
    ShardsIndex,
    parse_card,
    parse_record,
)
from tests.cards import (
    SHA,
    cluster_shards_card,
    clusters_card,
    drawn_card,
    encoded_card,
    ensemble_card,
    expert_card,
    lora_card,
    router_card,
    shards_index,
)

NAN, DEEP = float("nan"), {"a": {}}
for _ in range(bounds.PLAIN_DEPTH):
    DEEP = {"a": DEEP}

VALID: dict[type[CardRecord], dict[str, Any]] = {
    ShardsIndex: shards_index(),
    EncodedCard: encoded_card(),
    ClusterShardsCard: cluster_shards_card(),
    ReportRowsCard: {"kept": "sample"},
    EncodingPlan: {"format": 1, "kind": "partial", "card": encoded_card(), "blocks": 2, "names_sha256": SHA},
    ClustersCard: clusters_card(),
    DrawingPlan: {"format": 1, "kind": "partial", **drawn_card()},
    DrawnClustersCard: {
        "format": 1, "kind": "clusters", **drawn_card(), "k": 3, "counts": [{"train": 16, "val": 6}] * 3,
    },
    ExpertCard: expert_card(),
    LoraCard: lora_card(),
    RouterCard: router_card(),
    EnsembleCard: ensemble_card(),
}  # fmt: skip
KINDS = [pytest.param(kind, id=kind.__name__) for kind in VALID]


def parse(kind: type[CardRecord], values: Any) -> CardRecord:
    return parse_card(kind, values, "a.json") if issubclass(kind, Card) else parse_record(kind, values, "a.json")


@pytest.mark.parametrize("kind", KINDS)
def test_a_valid_card_comes_back_bit_for_bit(kind, tmp_path) -> None:
    card = parse(kind, VALID[kind])
    assert json.dumps(card.plain()) == json.dumps(VALID[kind])
    if isinstance(card, Card):
        write_card(tmp_path / "a.json", card)
        assert load_card(tmp_path / "a.json", kind) == card
        before = (tmp_path / "a.json").read_bytes()
        write_card(tmp_path / "a.json", load_card(tmp_path / "a.json", kind))
        assert (tmp_path / "a.json").read_bytes() == before


def changed(values: dict[str, Any], key: str, value: Any) -> dict[str, Any]:
    """A copy with another value at a dotted key, such as "shards.0.rows"."""
    values = copy.deepcopy(values)
    *parents, last = [int(part) if part.isdecimal() else part for part in key.split(".")]
    place: Any = values
    for part in parents:
        place = place[part]
    place[last] = value
    return values


REFUSED = [
    (ShardsIndex, "rows", 61, "the shards do not add up to 61 rows"),
    (ShardsIndex, "rows", True, "rows: got True, expected a valid integer"),
    (ShardsIndex, "shards", [], "shards: got [], expected"),
    (ShardsIndex, "shards.0.file", "../passwd", "shards.0.file: got '../passwd', expected"),
    (ShardsIndex, "shards.0.bytes", -1, "shards.0.bytes: got -1, expected greater than or equal to 0"),
    (ShardsIndex, "shards.0.sha256", "x", "shards.0.sha256: got 'x', expected"),
    (ShardsIndex, "columns.latent.dtype", "load", "columns.latent.dtype: got 'load', expected 'float16'"),
    (ShardsIndex, "columns.latent.shape", [1, 2**25], "columns.latent.shape.1: got 33554432, expected"),
    (ShardsIndex, "columns.latent.shape", [2**13, 2**13], "columns.latent.shape: a latent of 67,108,864 numbers"),
    (ShardsIndex, "columns.latent.shape", [1] * 9, "columns.latent.shape: got"),
    (ShardsIndex, "columns", {}, "columns: got {}, expected"),
    (ShardsIndex, "splits", {"train": 60}, "lacks splits.val"),
    (ShardsIndex, "card", DEEP, f"card: more than {bounds.PLAIN_DEPTH} levels"),
    (EncodedCard, "images.size", 0, "images.size: got 0, expected greater than or equal to 1"),
    (EncodedCard, "images.channels", 4, "images.channels: got 4, expected 1 or 3"),
    (EncodedCard, "images.size", 2**60, "images.size: got 1152921504606846976, expected less than"),
    (EncodedCard, "source", {"path": "x" * (bounds.MAX_TEXT + 1)}, "source: a string of 65,537 characters"),
    (EncodedCard, "codec", {"scale": NAN}, "codec: nan, expected a finite number"),
    (EncodedCard, "codec", {"channels": 10**40}, "codec: a whole number beyond 64 bits"),
    (EncodedCard, "codec", {"x" * 256: 1}, "codec: a key that is no string of at most 255 characters"),
    (EncodedCard, "codec", [], "codec: got [], expected a valid dictionary"),
    (EncodedCard, "precision", "x" * 256, "precision: got"),
    (EncodedCard, "counts.skipped", {"too small": -1}, "counts.skipped.too small: got -1"),
    (EncodedCard, "pictures", {}, "the key pictures is now called images"),
    (ClusterShardsCard, "cluster", bounds.MAX_CLUSTERS, "cluster: got 4096, expected less than 4096"),
    (ClusterShardsCard, "clusters", bounds.MAX_CLUSTERS + 1, "clusters: got 4097, expected less than or equal to 4096"),
    (ClusterShardsCard, "latent_shape", [4, 4], "lacks latent_shape.2"),
    (ClusterShardsCard, "latent_shape", [4, 2, 2, 2], "latent_shape: got [4, 2, 2, 2], expected"),
    (ClusterShardsCard, "latent_shape", [2000, 4, 4], "latent_shape.0: got 2000, expected less than or equal to 1024"),
    (ClusterShardsCard, "latent_shape", [4, 16_385, 4], "latent_shape.1: got 16385, expected less than"),
    (
        ClusterShardsCard,
        "latent_shape",
        [64, 1024, 1024],
        "latent_shape: a latent of 67,108,864 numbers, expected at m",
    ),
    (ClusterShardsCard, "colour", 1, "unknown key colour"),
    (ReportRowsCard, "kept", "pictures", "kept: got 'pictures', expected 'sample' or 'images'"),
    (EncodingPlan, "names_sha256", SHA.upper() + "A", "names_sha256: got"),
    (EncodingPlan, "card.pictures", {}, "card: the key pictures is now called images"),
    (ClustersCard, "k", 0, "k: got 0, expected greater than or equal to 1"),
    (ClustersCard, "k", 2**40, "k: got 1099511627776, expected less than or equal to 4096"),
    (ClustersCard, "method", "kmeans", "method: got 'kmeans', expected 'balanced', 'free' or 'random'"),
    (ClustersCard, "seed", 2**64, "seed: got 18446744073709551616, expected less than"),
    (ClustersCard, "router_fraction", 1.5, "router_fraction: got 1.5, expected less than or equal to 1"),
    (ClustersCard, "largest_over_mean", NAN, "largest_over_mean: got nan, expected"),
    (ClustersCard, "encoded", [], "encoded: got [], expected"),
    (ClustersCard, "counts", [], "counts has 0 entries, expected k = 3"),
    (ClustersCard, "counts", [{"train": 1, "val": 0}], "counts has 1 entries, expected k = 3"),
    (ClustersCard, "quality.clusters.0.words", [["moss", 1.5, 0.1]], "quality.clusters.0.words.0.1: got 1.5"),
    (DrawingPlan, "source.experts", [], "source.experts: got [], expected"),
    (
        DrawingPlan,
        "source.steps",
        bounds.MAX_STEPS + 1,
        "source.steps: got 10001, expected less than or equal to 10000",
    ),
    (DrawingPlan, "source.guidance_scale", 1e4, "source.guidance_scale: got 10000.0, expected less than or equal to"),
    (DrawingPlan, "source.captions.from", 3, "source.captions.from: got 3, expected"),
    (DrawnClustersCard, "k", 2**31, "k: got 2147483648, expected less than or equal to 4096"),
    (ExpertCard, "name", "x" * 256, "name: got"),
    (ExpertCard, "name", "", "name: got '', expected"),
    (ExpertCard, "k", 10**9, "k: got 1000000000, expected less than or equal to 4096"),
    (ExpertCard, "clusters", [], "clusters: got [], expected"),
    (ExpertCard, "clusters", [3], "clusters [3], expected different ones from 0 to k - 1 = 2"),
    (ExpertCard, "clusters", [1, 1], "clusters [1, 1], expected different ones"),
    (ExpertCard, "clusters", [-1], "clusters.0: got -1, expected greater than or equal to 0"),
    (ExpertCard, "latent_shape", [10**6, 10**6, 10**6], "latent_shape.0: got 1000000, expected less than"),
    (ExpertCard, "network", DEEP, f"network: more than {bounds.PLAIN_DEPTH} levels"),
    (ExpertCard, "network", "dit", "network: got 'dit', expected a valid dictionary"),
    (
        ExpertCard,
        "calibration.slope",
        [0.0, 0.5, 1.5],
        "calibration.slope.2: got 1.5, expected less than or equal",
    ),
    (ExpertCard, "calibration.slope", [0.0, 0.5], "calibration: slope has 2 values, expected one for each of 3 nodes"),
    (ExpertCard, "calibration.log_snr", [0.0, 0.0, 4.0], "calibration.log_snr: expected log-SNR nodes that increase"),
    (ExpertCard, "calibration.log_snr", [-200.0, 0.0, 4.0], "calibration.log_snr.0: got -200.0, expected greater than"),
    (ExpertCard, "calibration.log_snr", [float(n) for n in range(1025)], "calibration.log_snr"),
    (ExpertCard, "calibration.log_snr", [0.0], "calibration.log_snr: got [0.0], expected"),
    (ExpertCard, "calibration.x0_mse", [1.0, NAN, 1.0], "calibration.x0_mse.1: got nan, expected"),
    (ExpertCard, "calibration.x0_mse", [1.0, 1e31, 1.0], "calibration.x0_mse.1: got 1e+31, expected less than"),
    (ExpertCard, "training.hold_back", 0.1, "training: the key hold_back is now called calibration_holdout; rename it"),
    (ExpertCard, "training.settings.hold_back", 0.1, "training: the key hold_back is now called calibration_holdout"),
    (ExpertCard, "training.calibration_holdout", 2.0, "training.calibration_holdout: got 2.0, expected less than"),
    (ExpertCard, "training.steps", -1, "training.steps: got -1, expected greater than or equal to 0"),
    (ExpertCard, "training.seconds", -1.0, "training.seconds: got -1.0, expected greater than or equal to 0"),
    (ExpertCard, "training.validation", {"-2": NAN}, "training.validation.-2: got nan, expected"),
    (ExpertCard, "training.seed", 2**63, "training.seed: got 9223372036854775808, expected less than"),
    (ExpertCard, "training.teacher.by", "me", "training.teacher.by: got 'me', expected 'owner' or 'ensemble'"),
    (ExpertCard, "training.ema.sigma_rel", 7.0, "training.ema.sigma_rel: got 7.0, expected less than or equal to 1"),
    (ExpertCard, "conversion.source", {"dit.pt": "x"}, "conversion.source.dit.pt: got 'x', expected"),
    (ExpertCard, "conversion.notes", DEEP, "unknown key conversion.notes"),
    (
        ExpertCard,
        "weights.file",
        "../../etc/passwd",
        "weights.file: got '../../etc/passwd', expected weights.safetensors",
    ),
    (ExpertCard, "weights.sha256", "0", "weights.sha256: got '0', expected"),
    (RouterCard, "clusters", 10**9, "clusters: got 1000000000, expected less than or equal to 4096"),
    (RouterCard, "path", [[{"name": "linear"}, []]], "path.0.1: got [], expected"),
    (RouterCard, "accuracy_at_t", {"0.1": 2.0}, "accuracy_at_t.0.1: got 2.0, expected less than or equal to 1"),
    (EnsembleCard, "experts", [], "experts: got [], expected"),
    (EnsembleCard, "experts", [None], "experts.0: got None, expected"),
    (EnsembleCard, "experts", 3, "experts: got 3, expected"),
    (EnsembleCard, "experts", [{}] * (bounds.MAX_EXPERTS + 1), "experts"),
    (EnsembleCard, "experts.0.url", None, "experts.0.url: got None, expected"),
    (EnsembleCard, "experts.0.sha256", 7, "experts.0.sha256: got 7, expected"),
    (EnsembleCard, "router", [], "router: got [], expected"),
    (EnsembleCard, "router.sha256", "", "router.sha256: got '', expected"),
    (EnsembleCard, "stackings.file", "../a", "stackings.file: got '../a', expected"),
    (EnsembleCard, "stackings.weights.0.names", ["one"], "stackings.weights.0.names: got ['one'], expected"),
    (
        EnsembleCard,
        "stackings.weights.0.weights",
        [[0.5, -0.5], [0.5, 0.5]],
        "weights.0.weights.0.1: got -0.5",
    ),
    (EnsembleCard, "stackings.weights.0.x0_mse", [1.0], "stackings.weights.0: expected a weight of each of 2 replicas"),
    (EnsembleCard, "sampling", None, "sampling: got None, expected"),
    (EnsembleCard, "sampling.steps", 10**6, "sampling.steps: got 1000000, expected less than or equal"),
    (EnsembleCard, "sampling.steps", 0, "sampling.steps: got 0, expected greater than or equal to 1"),
    (
        EnsembleCard,
        "sampling.guidance_scale",
        -1e9,
        "sampling.guidance_scale: got -1000000000.0, expected greater",
    ),
    (EnsembleCard, "sampling.speed", 1, "unknown key sampling.speed"),
    (ClustersCard, "format", 2, "format 2, this version of atoll reads format 1; update atoll"),
    (ClustersCard, "kind", "expert", "a card of kind 'expert'; expected 'clusters'"),
]


@pytest.mark.parametrize(("kind", "key", "value", "said"), REFUSED)
def test_a_value_out_of_bounds_is_refused_with_its_key(kind, key, value, said) -> None:
    with pytest.raises(AtollError) as caught:
        parse(kind, changed(VALID[kind], key, value))
    message = str(caught.value)
    assert message.startswith("a.json: ")
    assert said in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"k": NaN}', "NaN is no JSON"),
        ('{"k": -Infinity}', "-Infinity is no JSON"),
        ('{"k": 1e999}', "1e999 is not finite"),
        ("[" * 100_000, "nested too deeply"),
        ("9" * 5000, "not readable JSON"),
        ("\udcff", "not readable JSON"),
    ],
)
def test_json_without_finite_numbers_or_end_is_refused(tmp_path, text, said) -> None:
    (tmp_path / "a.json").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(AtollError, match=rf"a\.json: .*{said}"):
        read_json(tmp_path / "a.json")


def test_a_large_file_and_a_pipe_are_refused_before_they_are_read(tmp_path) -> None:
    with (tmp_path / "a.json").open("wb") as file:
        file.truncate(bounds.CARD_BYTES + 1)  # a hole: nothing is on the disk
    with pytest.raises(AtollError, match="has 8,388,609 bytes; expected JSON of at most 8,388,608"):
        load_card(tmp_path / "a.json", ClustersCard)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(AtollError, match="is no regular file"):
        read_json(tmp_path / "pipe")


def test_a_card_that_could_not_be_read_is_not_written(tmp_path) -> None:
    card = parse_card(ClustersCard, clusters_card(), "a.json").model_copy(update={"k": 5})
    with pytest.raises(AtollError, match=r"the card for .*a\.json: counts has 3 entries, expected k = 5"):
        write_card(tmp_path / "a.json", card)
    assert not (tmp_path / "a.json").exists()


JUNK = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.integers(2**31, 10**30),
    st.floats(),
    st.text(max_size=3),
    st.just("\ud800\n"),
    st.lists(st.integers(), max_size=3),
    st.just([]),
    st.just({}),
    st.just({"name": "x"}),
    st.just({"name": ["x"]}),
)


def mutated(values: Any, data: st.DataObject) -> Any:
    """A copy with one key removed, renamed, or replaced by junk, anywhere."""
    values = copy.deepcopy(values)
    place = values
    while True:
        keys = list(place) if isinstance(place, dict) else list(range(len(place)))
        key = data.draw(st.sampled_from(keys))
        inner = place[key]
        if not isinstance(inner, dict | list) or not inner or data.draw(st.booleans()):
            break
        place = inner
    match data.draw(st.sampled_from(["remove", "rename", "replace", "replace", "replace"])):
        case "remove":
            del place[key]
        case "rename" if isinstance(place, dict):
            place[f"{key}_"] = place.pop(key)
        case _:
            place[key] = data.draw(JUNK)
    return values


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=150)
@given(data=st.data())
def test_a_mutated_card_is_read_or_refused_in_one_line(kind, data) -> None:
    values = mutated(VALID[kind], data)
    message = ""
    try:
        parse(kind, parse(kind, values).plain())
    except AtollError as error:
        message = str(error)
    assert "\n" not in message
