"""What may be done to make a step smaller or faster: one file or folder a move."""
