"""A planned step running; checkpoints."""
