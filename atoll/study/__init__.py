"""Experiments over several seeds: many runs that differ in one choice each, trained, evaluated and put into one table.

`run_study` does all of it, as does `atoll study eurosat`; run it again to resume.

recipe.py   the yaml file of a study, and the manifest of each run
run.py      trains and evaluates all runs
table.py    results.json and results.md
"""

from atoll.study.recipe import Study, StudyRun, load_study
from atoll.study.run import run_study

__all__ = ["Study", "StudyRun", "load_study", "run_study"]
