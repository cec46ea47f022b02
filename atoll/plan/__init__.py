"""`atoll plan`: cost and finishing date of a run, before anything is spent.

cost.py     parameters, FLOPs and bytes of a network, by formula
fit.py      the largest batch in a memory, and the switches that make it fit
gpus.py     memory, speed and price of known GPUs
predict.py  the plan
types.py    its values
sizes.py    a training over several sizes of images
sampling_cost.py   an image by top-1, by the recipe's routing, by all experts
recipe.py   shapes, widths and counts from a manifest
islands.py  the simulated collective
measure_machine.py   this machine's speed, and a finished run against its prediction
report.py   tables and JSON
"""

from atoll.plan.measure_machine import Comparison, compare_run
from atoll.plan.predict import plan, plan_run
from atoll.plan.report import as_json, comparison_lines, render
from atoll.plan.types import Machine, Plan, PlannedExpert

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
