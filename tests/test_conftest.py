"""The rules that all tests run under do hold."""

import random
import socket
import threading

import pytest


@pytest.mark.parametrize("address", [("192.0.2.1", 80), ("2001:db8::1", 80)])
def test_other_machines_are_out_of_reach(address: tuple[str, int]) -> None:
    family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
    with socket.socket(family) as client, pytest.raises(ConnectionRefusedError, match="not marked slow"):
        client.connect(address)


def test_names_of_other_machines_are_not_looked_up() -> None:
    with pytest.raises(ConnectionRefusedError, match="not marked slow"):
        socket.create_connection(("example.org", 80))


def test_this_machine_is_within_reach() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        thread = threading.Thread(target=lambda: server.accept()[0].close())
        thread.start()
        socket.create_connection(("localhost", server.getsockname()[1]), timeout=5).close()
        thread.join()


@pytest.mark.parametrize("run", [1, 2])
def test_random_numbers_are_the_same_in_every_test(run: int) -> None:
    assert random.random() == random.Random(0).random()
