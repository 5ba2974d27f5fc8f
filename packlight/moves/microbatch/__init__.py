"""A batch in k parts whose weighted losses add up to the whole one's."""
