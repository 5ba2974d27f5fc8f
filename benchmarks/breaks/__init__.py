"""What do graph breaks cost? See README.md."""
