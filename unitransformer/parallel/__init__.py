"""Strategies that spread training over devices, and what belongs to them."""
