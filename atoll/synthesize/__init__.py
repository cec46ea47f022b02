"""Data drawn by experts, to train a router and a student when the images are private: `atoll synthesize`.

DDM (arXiv 2501.05450) trains student and router on samples of the experts. Each expert, alone, draws latents of its own
cluster for given captions. The result is a run's directory; later stages read its encoded/ and clusters/ like real
data.

captions.py   the captions of each cluster and of each row
draw.py       the experts of one cluster -> latents of given rows
rows.py       key, split and noise of a row, functions of its number
write.py      synthesized.partial/ -> encoded/ and clusters/
run.py        the stage
"""

from atoll.synthesize.run import synthesize_run

__all__ = ["synthesize_run"]
