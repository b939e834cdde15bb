"""A worker on a real device, stepped by the test."""

import threading

from flashtensors.config import Settings
from flashtensors.worker.host import Worker
from flashtensors.worker.messages import Event


class Home:
    """Holds a worker and what it has told.

    Args:
        device: As in the settings.
        settings: Others.
    """

    def __init__(self, device: str, **settings: object) -> None:
        self.events: list[Event] = []
        bell = threading.Semaphore(0)
        self.worker = Worker(
            Settings(device=device, max_num_seqs=4, **settings),  # pyright: ignore
            emit=self.events.append,
            wake=bell.release,
        )
        self._bell = bell

    def wait_for(self, kind: type[Event] | tuple[type[Event], ...]) -> Event:
        while True:
            is_busy = self.worker.step()
            for event in self.events:
                if isinstance(event, kind):
                    self.events.remove(event)
                    return event
            if not is_busy:
                assert self._bell.acquire(timeout=60), f"the worker sleeps: {self.events}"
