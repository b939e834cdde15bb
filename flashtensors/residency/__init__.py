"""Which models are loaded, which must leave, and when."""
