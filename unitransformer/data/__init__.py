"""Data: sources, tokenizers, samples, and which samples form a batch."""
