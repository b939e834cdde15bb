"""Ollama's routes, which also control the daemon."""
