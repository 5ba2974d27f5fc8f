"""Where do the seconds of `fit` go, and how many are they beside another checkout's?"""
