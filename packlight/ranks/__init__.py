"""Several processes that train one model: what they say to one another, and how they fail."""
