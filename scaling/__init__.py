"""Sweeps of recipes, and reports and checks of their run records."""
