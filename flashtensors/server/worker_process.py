"""A worker process and the socket to it.

The worker connects to a ZeroMQ socket of this process, in a folder that only this user can enter. It gets its settings
on standard input, which stays open: when the daemon dies, however it dies, the worker reads the end of it and leaves.
"""

from __future__ import annotations
