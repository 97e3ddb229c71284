"""Processes that answer other programs about recipes."""
