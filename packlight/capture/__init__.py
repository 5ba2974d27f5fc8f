"""A model's training step captured as data: joint graph, costs of calls, exact peak."""
