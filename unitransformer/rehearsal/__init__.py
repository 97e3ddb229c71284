"""Builds and trains a config on tensors without numbers, as one rank of any number of ranks."""
