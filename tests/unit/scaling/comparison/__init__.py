"""Tests of comparisons by pairs."""
