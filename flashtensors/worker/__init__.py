"""One device's process: it holds models and runs their requests."""
