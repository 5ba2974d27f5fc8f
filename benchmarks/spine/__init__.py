"""At each rival's own measured peak, how long does a Packlight step take; how small can it get?"""
