"""What Packlight takes from torch beyond its documented interface, each thing under a name.

Any of it may move from one release of torch to the next, so it is reached from here alone, and what
is relied upon stands at each function. tests/test_torch_internals.py has a test for each (for
breaks, test_pieces.py), which says what has moved, and one that reads the sources for private names
of torch used elsewhere.

Dynamo and AOTAutograd are imported where they are used: planning without a model needs neither.
"""
