"""Modules that run inside a SLURM job."""
