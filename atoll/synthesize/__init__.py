"""Data that experts draw: what lets a router and a student train where nobody may give an image: `atoll synthesize`.

Where the data are private, DDM (arXiv 2501.05450) trains student and router on samples drawn from the experts. Each
expert, alone, draws latents of its own cluster for given captions; what is written is a run's directory whose encoded/
and clusters/ the later stages read as they read real ones.

captions.py   each cluster's captions, and which of them a drawn row has
draw.py       one cluster's experts -> latents of given rows
rows.py       what a row is: its key, its split, its noise; all functions of its number
write.py      synthesized.partial/ -> encoded/ and clusters/
run.py        the stage
"""

from atoll.synthesize.run import synthesize_run

__all__ = ["synthesize_run"]
