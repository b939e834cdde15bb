"""Serve many language models from one GPU, or from a CPU."""
