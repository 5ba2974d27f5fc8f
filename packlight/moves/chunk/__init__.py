"""Loss heads, MLPs and attention run a few rows at a time."""
