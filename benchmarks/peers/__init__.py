"""At each rival's own peak, how long does a whole training step take with Packlight?"""
