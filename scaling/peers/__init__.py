"""Trains other implementations of the same shape beside this one, and compares speed and memory."""
