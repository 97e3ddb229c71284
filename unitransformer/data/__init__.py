"""Data: sources, tokenizers, samples and the order of batches."""
