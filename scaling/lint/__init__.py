"""Checks that generated pages agree with their records."""
