"""Text and token ids: tokenising, chat templates, streaming text and stop strings."""
