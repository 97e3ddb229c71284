"""Computes medians, intervals, steady state and comparisons from raw samples."""
