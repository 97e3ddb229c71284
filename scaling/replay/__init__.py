"""Runs a recorded cell again and compares."""
