"""Trains what the manifest names, each part alone: in processes here, as tasks of Ray, or as jobs of Slurm.

job.py                      one part's training as a command line, and the process that runs it
place.py                    what a place is; local.py, ray.py, slurm.py: the three there are
loop.py                     submits, watches, restarts, stops
progress.py                 the live table
run.py                      all of that together
"""
