"""Fakes and tiny checkpoints, for our tests and for yours."""
