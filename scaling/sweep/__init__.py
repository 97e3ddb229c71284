"""Sweeps: studies, cells, and the processes that run them."""
