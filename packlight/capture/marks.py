"""Marks that rewriting a joint graph leaves in nodes' metadata, for whoever reads the graph."""

# The node runs with the backward although gradients do not depend on it: a loss computed chunk by
# chunk, together with its gradients.
LATE_KEY = "packlight_late"
