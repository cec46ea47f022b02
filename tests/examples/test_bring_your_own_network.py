"""examples/bring_your_own_network.py runs: plain torch modules become experts that pass the oracle."""

import sys

import pytest
import torch


@pytest.fixture(scope="module")
def own(example):
    return example("bring_your_own_network")


@pytest.fixture(scope="module")
def numbers(own, tmp_path_factory) -> dict[str, float]:
    path = tmp_path_factory.mktemp("own")
    torch.manual_seed(0)
    numbers = own.bring(path, steps=400, points=1000)
    assert (path / "samples.png").stat().st_size > 5000
    return numbers


def test_both_networks_pass_the_oracle(own, numbers) -> None:
    errors = [value for name, value in numbers.items() if name.startswith("oracle error")]
    assert len(errors) == 2
    assert max(errors) < own.TOLERANCE


def test_their_ensemble_samples_the_data(numbers) -> None:
    assert numbers["distance of the samples"] < 2 * numbers["floor"]


def test_an_untrained_network_fails_the_oracle(own, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(sys, "argv", ["bring_your_own_network.py", str(tmp_path), "--steps", "1"])
    with pytest.raises(SystemExit, match="expected at most"):
        own.main()
