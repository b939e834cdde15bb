"""Architectures as short modules, each with its weight layout."""
