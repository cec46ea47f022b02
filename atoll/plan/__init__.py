"""`atoll plan`: what a run will cost, and when it will be done, before anything is spent.

cost.py     parameters, FLOPs and bytes of a network, by formula
fit.py      the largest batch in a memory, and the switches that make it fit
gpus.py     memory, speed and price of the GPUs that are known
predict.py  the plan, from all of these
recipe.py   what a manifest says about all that
islands.py  the simulated collective
here.py     this machine's speed, and a finished run against its prediction
report.py   tables and JSON
"""

from atoll.plan.measure_machine import Comparison, compare_run
from atoll.plan.predict import Machine, Plan, PlannedExpert, plan, plan_run
from atoll.plan.report import as_json, comparison_lines, render

__all__ = [
           "Comparison",
           "Machine",
           "Plan",
           "PlannedExpert",
           "as_json",
           "compare_run",
           "comparison_lines",
           "plan",
           "plan_run",
           "render",
]  # fmt: skip
