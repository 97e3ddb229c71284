"""Writes, finds, verifies and reads checkpoints."""
