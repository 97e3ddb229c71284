"""Predicts memory, time and cost of a training step, before anything runs."""
