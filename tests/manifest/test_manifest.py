from itertools import pairwise

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from atoll.errors import AtollError
from atoll.manifest import RECIPES, Manifest, load_manifest, parse_manifest, recipe_path

SMALL = {
    "name": "small",
    "clusters": {"k": 2},
    "experts": [{"cluster": 0, "objective": {"prediction": "eps", "schedule": "cosine"}}],
}


def parse(**changes) -> Manifest:
    return parse_manifest(yaml.safe_dump({**SMALL, **changes}), "atoll.yaml")


@pytest.mark.parametrize(
    "recipe",
    sorted([*RECIPES.glob("*.yaml"), *RECIPES.glob("baseline/*.yaml")]),
    ids=lambda path: f"{path.parent.name}/{path.stem}",
)
def test_every_recipe_is_valid(recipe) -> None:
    manifest = load_manifest(recipe)
    assert manifest.name == recipe.stem
    assert {e.cluster for e in manifest.experts} == set(range(manifest.clusters.k))


def test_overrides_reach_one_expert_alone() -> None:
    expert = {"cluster": 1, "objective": {"prediction": "flow", "schedule": "linear"}}
    manifest = parse(experts=[*SMALL["experts"], {**expert, "network": {"width": 64}, "train": {"lr": "1e-4"}}])
    first, second = manifest.experts
    assert (manifest.network_of(first).width, manifest.network_of(second).width) == (128, 64)
    assert (manifest.train_of(first).lr, manifest.train_of(second).lr) == (1e-3, 1e-4)


def test_experts_are_found_by_cluster_or_name() -> None:
    flow = {"cluster": 0, "objective": {"prediction": "flow", "schedule": "linear"}}
    one = parse()
    assert one.find_expert("0").full_name == one.find_expert("0-eps-cosine").full_name == "0-eps-cosine"
    two = parse(experts=[*SMALL["experts"], flow])
    assert two.find_expert("0-flow-linear").objective.prediction == "flow"
    with pytest.raises(AtollError, match="cluster 0 has 2 experts; expected one of 0-eps-cosine, 0-flow-linear"):
        two.find_expert("0")
    with pytest.raises(AtollError, match="no expert '7'"):
        two.find_expert("7")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"trian": {}}, "unknown key trian; expected one of name, seed"),
        ({"train": {"stesp": 3}}, "unknown key train.stesp; expected one of steps, batch"),
        ({"train": {"hold_back": 0.1}}, "train: the key hold_back is now called calibration_holdout"),
        ({"evaluate": {"kept": 5}}, "evaluate: the key kept is now called max_features"),
        ({"evaluate": {"diagnosed": 5}}, "evaluate: the key diagnosed is now called diagnostic_samples"),
        (
            {"experts": [{**SMALL["experts"][0], "train": {"hold_back": 0.1}}]},
            "the key hold_back is now called calibration_holdout",
        ),
        ({"train": {"steps": 0}}, "train.steps"),
        ({"train": {"lr": "fast"}}, "train.lr"),
        ({"clusters": {"k": 2, "method": "best"}}, "clusters.method"),
        ({"experts": []}, "at least one expert"),
        ({"experts": [{**SMALL["experts"][0], "cluster": 2}]}, "numbered 0 to 1"),
        ({"experts": SMALL["experts"] * 2}, "two experts are called 0-eps-cosine"),
        (
            {"experts": [{"cluster": 0, "objective": {"prediction": "epsilon", "schedule": "cosine"}}]},
            "unknown prediction 'epsilon'; expected one of eps, x0, v, flow",
        ),
        (
            {"experts": [{"cluster": 0, "objective": {"prediction": "eps", "schedule": "cos"}}]},
            "unknown schedule 'cos'",
        ),
        ({"network": {"dual_blocks": 2}}, "dual_blocks 2: only the network mmdit has it"),
        ({"network": {"bottleneck": 8}}, "bottleneck 8: only the network mmdit has it"),
        (
            {"network": {"name": "mmdit", "modulation": "per-block"}},
            "modulation per-block: only the network dit has it",
        ),
        ({"network": {"name": "mmdit", "depth": 2, "dual_blocks": 2}}, "dual_blocks 2: expected fewer than depth, 2"),
        ({"network": {"name": "unet"}}, "'dit' or 'mmdit'"),
        ({"router": {"network": {"name": "mmdit", "dual_blocks": 1}}}, "dual_blocks 1: a router does not have it"),
        ({"experts": [{**SMALL["experts"][0], "network": {"widht": 3}}]}, "widht"),
        ({"sampling": {"routing": "best"}}, "unknown routing 'best'"),
    ],
)
def test_mistakes_are_named_in_one_line(changes, message) -> None:
    with pytest.raises(AtollError, match=r"atoll\.yaml: ") as error:
        parse(**changes)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["", "- a", "a: [", "3: 4", "name: x"])
def test_what_is_no_manifest_is_refused(text) -> None:
    with pytest.raises(AtollError, match=r"atoll\.yaml"):
        parse_manifest(text, "atoll.yaml")


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=150)
@given(st.sampled_from(sorted(Manifest.model_fields)), values)
def test_any_value_under_any_key_is_accepted_or_refused_in_one_line(key, value) -> None:
    message = ""
    try:
        parse(**{key: value})
    except AtollError as error:
        message = str(error)
    assert "\n" not in message


def test_missing_files_are_named(tmp_path) -> None:
    with pytest.raises(AtollError, match="atoll init"):
        load_manifest(tmp_path)
    with pytest.raises(AtollError, match="demo"):
        recipe_path("nothing")


def nine_times(value: str) -> str:
    """Ten levels of YAML, each with nine aliases of the one before it."""
    levels = (f"{b}: &{b} " + value.format(",".join([f"*{a}"] * 9)) for a, b in pairwise("abcdefghij"))
    return "\n".join(["a: &a {x: 1}", *levels])


LISTS, MERGES = nine_times("[{}]"), nine_times("{{<<: [{}]}}")


@pytest.mark.parametrize("text", [LISTS, MERGES, "a: &a [*a, *a]\n"], ids=["lists", "merges", "cycle"])
def test_aliases_that_describe_a_huge_value_are_refused(text) -> None:
    with pytest.raises(AtollError, match=r"atoll\.yaml: its aliases \(\*NAME\) describe more than 1,000,000 values"):
        parse_manifest(text, "atoll.yaml")


def test_usual_aliases_are_read() -> None:
    experts = (
        "experts:\n- &one {cluster: 0, objective: {prediction: flow, schedule: linear}}\n- {<<: *one, cluster: 1}\n"
    )
    parsed = parse_manifest(f"name: small\nclusters: {{k: 2}}\n{experts}", "atoll.yaml")
    assert [expert.cluster for expert in parsed.experts] == [0, 1]


def test_a_deep_nesting_is_refused_in_one_line() -> None:
    with pytest.raises(AtollError, match=r"nested too deeply"):
        parse_manifest("[" * 3000, "atoll.yaml")


def test_the_network_is_chosen_by_its_name_and_has_its_own_keys() -> None:
    expert = {"cluster": 1, "objective": {"prediction": "flow", "schedule": "linear"}}
    experts = [*SMALL["experts"], {**expert, "network": {"name": "mmdit", "dual_blocks": 1}}]
    manifest = parse(experts=experts, router={"network": {"name": "mmdit", "modulation": "single"}})
    dit, mmdit = (manifest.network_of(part).config() for part in (manifest.experts[0], manifest.experts[-1]))
    assert (dit["name"], dit["mlp_ratio"], dit["modulation"]) == ("dit", 4.0, "single")
    assert dit.keys() == {"name", "patch", "width", "depth", "heads", "mlp_ratio", "modulation"}
    assert (mmdit["name"], mmdit["mlp_ratio"], mmdit["dual_blocks"]) == ("mmdit", 10 / 3, 1)
    assert mmdit.keys() == dit.keys() - {"modulation"} | {"dual_blocks", "size_embedding", "bottleneck"}
    router = manifest.router.network.config()
    assert (router["block"], router["mlp_ratio"], router["modulation"]) == ("mmdit", 10 / 3, "single")
    assert "block" not in parse().router.network.config()  # as in the cards of earlier routers


def _levels(low: float, high: float) -> dict[str, object]:
    return {"prediction": "flow", "schedule": "linear", "levels": [low, high]}


@pytest.mark.parametrize(
    ("experts", "generalist", "missing"),
    [
        ([(0, 0.2, 1)], (0, 0.2), None),
        ([(0, 0.2, 1)], (0, 0.1), "cluster 0 at the levels 0.1 to 0.2"),
        ([(0, 0.2, 1), (1, 0.3, 1)], (0, 0.2), "cluster 1 at the levels 0.2 to 0.3"),
        ([(0, 0.2, 1)], None, "cluster 0 at the levels 0 to 0.2"),
        ([(0, 0, 0.5), (0, 0.4, 0.9)], None, "cluster 0 at the levels 0.9 to 1"),
        ([(0, 0.5, 1), (0, 0, 0.5)], None, None),
    ],
)
def test_a_level_that_no_network_denoises_is_found_before_training(experts, generalist, missing) -> None:
    changes = {
        "experts": [
            {"cluster": cluster, "name": str(i), "objective": _levels(low, high)}
            for i, (cluster, low, high) in enumerate(experts)
        ],
        **({"generalist": {"objective": _levels(*generalist)}} if generalist else {}),
    }
    if missing is None:
        assert len(parse(**changes).experts) == len(experts)
        return
    with pytest.raises(AtollError, match=f"no network denoises {missing}"):
        parse(**changes)
