"""A step in stages on several ranks: cut, planned, run by a schedule that is data."""
