"""How many bytes do optimizers hold, and how long does their step take?"""
