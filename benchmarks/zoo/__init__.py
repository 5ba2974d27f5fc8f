"""Which families of models does Packlight train, at which budgets, and are the bits eager's?"""
