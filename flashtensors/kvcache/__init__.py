"""Accounting of KV cache blocks and of shared prefixes, in plain ints."""
