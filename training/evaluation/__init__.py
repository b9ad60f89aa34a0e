"""Evaluation of bundles on held-out data."""
