"""Many model families, and the harness that trains each of them inside a budget."""
