"""Sections of the generated pages."""
