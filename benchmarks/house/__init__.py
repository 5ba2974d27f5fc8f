"""Does a rebuilt planner still find plans as good, and how long does it take?"""
