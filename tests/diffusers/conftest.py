"""A pipeline of the tiny trained run, which all tests of this directory share."""

import pytest

from atoll.diffusers import AtollPipeline
from atoll.runtime.libraries import quiet

with quiet("diffusers"):
    import diffusers


@pytest.fixture(scope="module")
def loaded(trained_run) -> AtollPipeline:
    return AtollPipeline.from_pretrained(trained_run / "ensemble")


@pytest.fixture
def pipe(loaded) -> AtollPipeline:
    """A pipeline of its own over the same weights."""
    pipe = AtollPipeline(ensemble=loaded.ensemble, scheduler=diffusers.FlowMatchEulerDiscreteScheduler())
    pipe.set_progress_bar_config(disable=True)
    return pipe
