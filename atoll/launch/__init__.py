"""Trains every part that the manifest names, each alone: in local processes, as Ray tasks, or as Slurm jobs.

job.py                      one part's training as a command line, and the process that runs it
backend.py                  the interface of a backend; local.py, ray.py and slurm.py implement it
loop.py                     submits jobs, polls them, restarts and stops them
progress.py                 the live table
run.py                      `atoll launch` as one function
"""
