"""The gate: whether an expert of a stranger does what its card says. docs/collective.md describes it.

check.py      the result of a check, and the quantiles that thresholds come from
contents.py   card and weights against the collective's run; nothing is computed
linear.py     the best linear denoiser of some latents: the reference that always exists
captioned.py  the same with captions: what they are worth
probe.py      secret rows, and their noise
errors.py     errors of experts and references, row by row
checks.py     the checks that evaluate the network
judge.py      all checks in order, cheapest first

Each check is a function that returns a `Check`. A threshold is a quantile of what an honest expert can show, or the
error of a reference that is computed from the data; none is a constant chosen by hand.
"""
