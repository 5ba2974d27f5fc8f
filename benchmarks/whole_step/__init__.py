"""How does a whole step's time grow as its budget shrinks, and which moves does Packlight make?"""
