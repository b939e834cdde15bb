"""Batches of copies to a GPU: every byte at its place, whatever the pieces."""

from __future__ import annotations

import pytest
import torch

from flashtensors.memory.host_pool import HostPool
from flashtensors.memory.pinning import CudaPinning
from flashtensors.transfer.driver_copies import find_driver_copies


def test_there_is_no_driver_for_a_cpu():
    assert find_driver_copies(torch.device("cpu")) is None


@pytest.mark.gpu
@pytest.mark.parametrize("piece_bytes", [1, 100, 4096, 460 * 1024])
def test_pieces_arrive_where_they_were_sent(piece_bytes: int):
    device = torch.device("cuda", 0)
    copies = find_driver_copies(device)
    if copies is None:
        pytest.skip("this driver has no batches")
    num_pieces = min(2000, (16 * 1024**2) // piece_bytes)
    num_bytes = num_pieces * piece_bytes
    target_B = torch.zeros(2 * num_bytes, dtype=torch.uint8, device=device)
    with HostPool(2 * 17 * 1024**2, chunk_bytes=16 * 1024**2, pinning=CudaPinning(device)) as pool:
        page = pool.allocate()
        assert page is not None
        assert page.is_pinned
        page.bytes_B[:num_bytes] = torch.randint(0, 256, (num_bytes,), dtype=torch.uint8)
        places = torch.randperm(2 * num_pieces)[:num_pieces].tolist()
        stream = torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            sources = [page.bytes_B.data_ptr() + index * piece_bytes for index in range(num_pieces)]
            targets = [target_B.data_ptr() + place * piece_bytes for place in places]
            copies.copy(targets, sources, [piece_bytes] * num_pieces)
        stream.synchronize()
        found = target_B.cpu().view(2 * num_pieces, piece_bytes)
        expected = torch.zeros_like(found)
        expected[places] = page.bytes_B[:num_bytes].view(num_pieces, piece_bytes)
        assert torch.equal(found, expected)
