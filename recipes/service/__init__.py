"""Processes that plan and run recipes for other programs."""
