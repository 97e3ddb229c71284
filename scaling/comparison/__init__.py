"""Compares two versions of a training step by pairs of steps measured in turn."""
