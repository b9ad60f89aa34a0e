"""Base models, batching and decoding."""
