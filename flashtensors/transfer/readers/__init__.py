"""Ways of reading files, one per module."""
