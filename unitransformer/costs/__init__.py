"""Computes FLOPs, memory and peak rates by formula."""
