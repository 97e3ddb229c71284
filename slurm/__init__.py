"""Submits, runs and watches batch jobs under SLURM. Does not import torch."""
