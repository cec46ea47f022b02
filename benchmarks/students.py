"""Students of an ensemble against their teacher and the monolith, over several seeds.

    python benchmarks/students.py runs/demo owner=runs/owner/student ensemble=runs/ensemble/student

The run gives the ensemble, the monolith and the data; each NAME=DIRECTORY is a student (`atoll distil`). Each seed has
other prompts, noise and real images. Prints the Frechet distance, its standard deviation, and the denoising error.
"""

import argparse
import statistics
import warnings
from pathlib import Path

from atoll.ensemble.loading import load_ensemble
from atoll.evaluate import Variant, evaluate
from atoll.evaluate.run import open_run
from atoll.manifest import load_manifest


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("students", nargs="*", metavar="NAME=DIRECTORY")
    parser.add_argument("--seeds", type=int, default=5)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    opened, settings = open_run(options.run), load_manifest(options.run).evaluate
    ensembles = {"ensemble": opened.loaded.ensemble}
    if "monolith" in opened.dense:
        ensembles["monolith"] = opened.dense["monolith"].ensemble
    for name, _, directory in (student.partition("=") for student in options.students):
        ensembles[f"student {name}"] = load_ensemble(directory).ensemble
    variants = [Variant(name, ensemble) for name, ensemble in ensembles.items()]
    results_by_seed = [
        evaluate(variants, opened.reference, settings.model_copy(update={"seed": s})) for s in range(options.seeds)
    ]
    print(f"{results_by_seed[0].frechet_name}: mean, standard deviation; denoising error")
    for name in ensembles:
        scores = [results.score(name) for results in results_by_seed]
        distances = [float("nan") if score.frechet is None else score.frechet for score in scores]
        spread = statistics.stdev(distances) if len(distances) > 1 else 0.0
        error = statistics.mean(score.denoising.mean for score in scores)
        print(f"{name:24} {statistics.mean(distances):.3f} {spread:.3f}  {error:.3f}")


if __name__ == "__main__":
    main()
