"""A schedule made to run: graphs, random-number replay, the backend, `fit`, checkpoints."""
