"""What the backward reads, approximated: techniques, their errors, and the choice among them."""
