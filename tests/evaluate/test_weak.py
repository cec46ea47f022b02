"""Evaluation of an ensemble that is guided away from a weak one."""

from dataclasses import replace

import pytest

from atoll.ensemble.loading import load_ensemble
from atoll.evaluate import evaluate
from atoll.evaluate.run import open_run
from atoll.evaluate.types import Variant
from atoll.evaluate.variants import with_identities
from atoll.manifest import EvaluateSettings


def test_its_images_and_operations_are_those_of_both(trained_run) -> None:
    run = open_run(trained_run)
    main = replace(run.loaded.ensemble, routing="top-1")
    weak = replace(main, weak=load_ensemble(trained_run / "monolith").ensemble)
    variants = [
        Variant("none", weak, guidance_scale=1.0),
        Variant("null", main, guidance_scale=3.0),
        Variant("weak", weak, guidance_scale=3.0),
    ]
    settings = EvaluateSettings(images=8, steps=2, held_out=2, levels=(0.5,), workers=1, batch=8)
    none, null, guided = evaluate(variants, run.reference, settings).scores
    # The monolith has the size of an expert: one more evaluation for each of the expert's.
    assert guided.gflops == pytest.approx(null.gflops, rel=0.1)
    assert guided.gflops > 1.5 * none.gflops
    assert len({score.frechet for score in (none, null, guided)}) == 3
    # The denoising error is that of the ensemble, without guidance.
    assert none.denoising == guided.denoising


def test_its_results_are_not_cached_as_those_of_the_ensemble(trained_run) -> None:
    main = load_ensemble(trained_run / "ensemble").ensemble
    weak = replace(main, weak=load_ensemble(trained_run / "monolith").ensemble)
    named = with_identities([Variant("main", main), Variant("weak", weak)], {}, {"ensemble": "a"})
    assert (bool(named[0].identity), named[1].identity) == (True, "")
