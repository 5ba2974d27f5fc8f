"""Parameters and optimizer state that lie on a disk between uses."""
