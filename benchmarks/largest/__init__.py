"""How deep a GPT trains in so many bytes of process memory, for each tool."""
