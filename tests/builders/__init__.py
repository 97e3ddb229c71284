"""Builds the records, runs, sweeps and fakes that several tests use."""
