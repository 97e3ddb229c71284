"""Instruments that slow a step down and run for a few steps only."""
