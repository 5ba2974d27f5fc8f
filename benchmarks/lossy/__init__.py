"""What do approximate backwards cost in quality, and how fast are their kernels?"""
