"""Slow and simple answers that the tests hold the fast and clever code against."""
