"""Several calls as one operation: compiled once, called like any other."""
