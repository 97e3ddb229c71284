"""Batch jobs under SLURM: submitted, run, survived, told. Nothing here imports torch."""
