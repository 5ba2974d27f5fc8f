"""Random models, losses, batches and loops: no raw error, no wrong bit, no byte over budget."""
