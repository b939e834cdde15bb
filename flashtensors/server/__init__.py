"""The daemon: HTTP, text, supervision of workers, metrics. Sees no tensor."""
