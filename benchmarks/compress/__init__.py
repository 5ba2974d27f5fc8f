"""How small does a trained model become, as a file, and at which error?"""
