"""Which way to run a step is fastest within the budget."""
