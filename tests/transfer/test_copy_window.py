"""How many copies may be on their way at once."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest

from flashtensors.transfer.copy_stream import HostCopyStream
from flashtensors.transfer.copy_window import GROUP_COPIES, CopyWindow


@dataclass
class FakeEvent:
    stream: FakeStream
    num_before: int

    def synchronize(self) -> None:
        self.stream.num_ended = max(self.stream.num_ended, self.num_before)


@dataclass
class FakeStream(HostCopyStream):
    """Ends copies only when somebody waits for them."""

    num_queued: int = 0
    num_ended: int = 0
    most: int = field(default=0)

    def queue(self, num_copies: int) -> None:
        self.num_queued += num_copies
        self.most = max(self.most, self.num_queued - self.num_ended)

    def record(self) -> FakeEvent:  # pyright: ignore
        return FakeEvent(self, self.num_queued)


@pytest.mark.parametrize("copies_per_block", [1, 5, 36, 63, 64, 65, 200])
def test_never_more_than_a_window_and_what_is_between_two_events(copies_per_block: int):
    stream = FakeStream()
    window = CopyWindow(stream, max_copies=640)
    for _ in range(500):
        stream.queue(copies_per_block)
        window.add(copies_per_block)
    assert stream.most <= 640 + GROUP_COPIES + 2 * copies_per_block
    if 500 * copies_per_block > 1000:
        assert stream.most >= 512, "the link would idle"


def test_nothing_waits_where_copies_end_at_once():
    window = CopyWindow(HostCopyStream(), max_copies=1)
    for _ in range(1000):
        window.add(7)
