"""The user's optimizer on one parameter at a time, and what it holds."""
