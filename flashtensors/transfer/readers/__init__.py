"""Ways of reading files, one per module.

Threads that sleep in `preadv` reach the limit of a 3 GB/s disk and of the page cache (36 GB/s with 16 of them), because
Python lets other threads run meanwhile; io_uring is no quicker (`benchmarks/transfer/bench_io_uring.py`), and
containers often forbid it.
"""
