"""Tuner layers: modules plus the deltas of their adapters."""
