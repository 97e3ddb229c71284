"""Strategies that spread training over devices, and the wrappers applied before them."""
