"""Benchmarks: one folder per question, each with its script, its measurements and its tables."""
