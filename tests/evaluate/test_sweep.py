"""Sweeps: every requested combination once, each under its own name."""

import pytest
import torch
from torch import Tensor

from atoll.calibration import Calibration
from atoll.ensemble import Ensemble, Expert
from atoll.errors import AtollError
from atoll.evaluate.sweep import aligned, choose_experts, parse_sweep, read_prompts, variants_of_sweep
from atoll.evaluate.variants import variants_of_sweeps, with_identities
from atoll.manifest import SweepSettings
from atoll.objective import Objective
from atoll.schedule import Cosine
from atoll.solver import times_of


def expert(cluster: int, name: str, prediction: str = "flow") -> Expert:
    objective = Objective(prediction, "linear" if prediction == "flow" else "cosine")
    curve = Calibration(
        torch.zeros(1, 4, 6), torch.linspace(-6, 6, 5), torch.full((5,), 0.5), torch.ones(5), torch.ones(5)
    )

    def network(x: Tensor, time: Tensor, condition: object) -> Tensor:
        return x * 0 + cluster + (10 if name == "eps" else 0)

    return Expert(network, objective, (cluster,), calibration=curve, name=f"{cluster}-{name}")


def uniform(x: Tensor, t: Tensor, pooled: Tensor | None) -> Tensor:
    return x.new_zeros(len(x), 2).log_softmax(1)


@pytest.fixture
def ensemble() -> Ensemble:
    experts = [
        expert(cluster, name, "eps" if name == "eps" else "flow") for name in ("flow", "eps") for cluster in (0, 1)
    ]
    return Ensemble(experts, uniform, "top-1")


@pytest.fixture
def monolith() -> Ensemble:
    return Ensemble([expert(0, "mono")], None)


def test_a_sweep_has_every_combination_once(ensemble, monolith) -> None:
    sweep = SweepSettings(
        routing=("top-1", "full"), guidance_scale=(1.0, 2.5), steps=(3,), alignment=("snr", "native"), monolith=True
    )
    all_variants = list(variants_of_sweep(sweep, ensemble, {"monolith": monolith}))
    names = [variant.name for variant in all_variants]
    assert len(set(names)) == len(names) == 2 * (2 * 2 + 1)
    assert "full, native, 3 steps, guidance 2.5" in names
    assert "monolith, 3 steps, guidance 1" in names
    by_name = {variant.name: variant for variant in all_variants}
    one = by_name["full, native, 3 steps, guidance 2.5"]
    assert (one.ensemble.routing, one.ensemble.alignment, one.steps, one.guidance_scale) == ("full", "native", 3, 2.5)
    assert one.axes == {"routing": "full", "alignment": "native", "steps": 3, "guidance_scale": 2.5}
    assert by_name["monolith, 3 steps, guidance 1"].ensemble is monolith


def test_an_axis_left_out_keeps_the_ensembles_value(ensemble) -> None:
    (only,) = variants_of_sweep(SweepSettings(guidance_scale=(2.0,)), ensemble, {})
    assert (only.name, only.ensemble.routing, only.steps) == ("guidance 2", "top-1", None)


def test_experts_are_chosen_by_cluster(ensemble) -> None:
    mixed = choose_experts(ensemble, {"all": "flow", 1: "eps"}, "mixed")
    assert [one.name for one in mixed.experts] == ["0-flow", "1-eps"]
    both = choose_experts(ensemble, {0: ("flow", "eps")}, "both of 0")
    assert [one.name for one in both.experts] == ["0-flow", "0-eps"]


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        ({"all": "x0"}, "no expert 0-x0; expected one of 0-flow, 1-flow, 0-eps, 1-eps"),
        ({5: "flow"}, "no cluster 5; expected 0 to 1, or all"),
        ({"all": ()}, "no expert chosen"),
    ],
)
def test_a_missing_expert_or_cluster_is_refused(ensemble, chosen, message) -> None:
    with pytest.raises(AtollError, match=message):
        choose_experts(ensemble, chosen, "this")


@pytest.mark.parametrize("name", ["monolith", "student"])
def test_a_missing_dense_model_is_refused(ensemble, name) -> None:
    with pytest.raises(AtollError, match=f"{name}, but the run has none; train it with `atoll train {name}`"):
        list(variants_of_sweep(SweepSettings(**{name: True}), ensemble, {}))


def test_alignments_differ_and_do_not_change_the_ensemble(ensemble) -> None:
    x, t = torch.randn(3, 1, 4, 6), torch.tensor([0.2, 0.6, 0.9])
    eps = choose_experts(ensemble, {"all": "eps"}, "eps")
    velocities = [aligned(eps, how).velocity(x, t) for how in ("snr", "native", "snr-clamp", "snr-alone")]
    for i, one in enumerate(velocities):
        for j, other in enumerate(velocities[:i]):
            assert not torch.allclose(one, other) or (j, i) == (2, 3)  # nothing here is large enough to be clamped
    assert all(expert.calibration is not None for expert in ensemble.experts)
    with pytest.raises(AtollError, match="alignment 'none'; expected one of snr"):
        aligned(ensemble, "none")


def test_a_variant_of_two_sweeps_is_measured_once(ensemble, monolith) -> None:
    sweeps = [SweepSettings(routing=("top-1", "full")), SweepSettings(routing=("full",)), SweepSettings(monolith=True)]
    sweeps.append(SweepSettings(student=True))
    student = Ensemble(monolith.experts, None)
    variants, groups, _ = variants_of_sweeps(sweeps, ensemble, {"monolith": monolith, "student": student})
    assert [variant.name for variant in variants] == ["top-1", "full", "monolith", "student"]
    assert variants[3].ensemble is student
    assert groups == {"sweep": ("top-1", "full"), "monolith": ("monolith", "student")}


def test_variants_that_sample_differently_have_other_identities(ensemble, monolith) -> None:
    sweep = SweepSettings(
        routing=("top-1", "full"),
        alignment=("snr", "native", "snr-alone"),
        experts={"flow": {"all": "flow"}, "eps": {"all": "eps"}},
        monolith=True,
    )
    dense = {"monolith": monolith}
    variants = list(variants_of_sweep(sweep, ensemble, dense))
    parts = {"ensemble": "a", "monolith": "b"}
    identities = [variant.identity for variant in with_identities(variants, dense, parts)]
    assert len(set(identities)) == len(identities) == 13
    assert identities == [variant.identity for variant in with_identities(variants, dense, parts)]
    retrained = with_identities(variants, dense, {**parts, "ensemble": "c"})
    assert [one.identity in identities for one in retrained] == [True] + [False] * 12


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (["color=red"], "expected an axis with values"),
        (["routing"], "expected an axis with values"),
        (["experts=flow"], "expected an axis with values"),
        (["routing=best"], "--sweep routing.*best"),
        (["steps=0"], "--sweep steps.0.*greater than 0"),
        (["alignment=exact"], "--sweep alignment.0"),
        (["guidance=much"], "--sweep guidance_scale.0"),
    ],
)
def test_a_bad_sweep_raises_one_line(text, message) -> None:
    with pytest.raises(AtollError, match=message) as caught:
        parse_sweep(text)
    assert "\n" not in str(caught.value)


def test_the_command_lines_axes_are_parsed() -> None:
    sweep = parse_sweep(["routing=top-1, full", "guidance=1,2.5", "steps=4", "monolith"])
    assert sweep == SweepSettings(routing=("top-1", "full"), guidance_scale=(1, 2.5), steps=(4,), monolith=True)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty; expected one prompt per line"),
        (b"a cat\n\na dog\n", "line 2 is empty"),
        (b"a cat\n  \n", "line 2 is empty"),
        (b"a cat\na dog\na cat\n", "lines 1 and 3 are equal"),
        (b"\xff\xfe\x00", "cannot be read"),
    ],
)
def test_a_bad_file_of_prompts_is_refused(tmp_path, content, message) -> None:
    file = tmp_path / "prompts.txt"
    file.write_bytes(content)
    with pytest.raises(AtollError, match=message):
        read_prompts(file)
    with pytest.raises(AtollError, match="cannot be read"):
        read_prompts(tmp_path)


def test_prompts_are_read_unchanged(tmp_path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_bytes("\ufeffa cat, sitting\r\nein Hund\u00e4\n".encode())
    assert read_prompts(file) == ("a cat, sitting", "ein Hund\u00e4")


def test_steps_can_be_even_in_another_schedules_time(ensemble) -> None:
    all_variants = list(variants_of_sweep(SweepSettings(grid=("even", "cosine"), method=("euler",)), ensemble, {}))
    assert [variant.name for variant in all_variants] == ["euler, even grid", "euler, cosine grid"]
    even, cosine = all_variants
    assert even.times(5) is None
    torch.testing.assert_close(cosine.times(5), times_of(Cosine(), 5))
    assert cosine.axes == {"method": "euler", "grid": "cosine"}
    assert parse_sweep(["grid=even,linear-beta"]).grid == ("even", "linear-beta")
    with pytest.raises(AtollError, match=r"unknown schedule 'cosin'.*; or even"):
        parse_sweep(["grid=cosin"])
