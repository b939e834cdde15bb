from __future__ import annotations

from flashtensors.engine.turns import PREFIX_TOKENS, PRIORITY_STRIDE, Turns, preferred

from .traffic import request


def test_interactive_requests_are_served_in_order() -> None:
    turns = Turns()
    ranks = [turns.next(request("r", [9 - number]), number) for number in range(5)]
    assert ranks == sorted(set(ranks))


def test_a_priority_is_worth_a_bounded_number_of_arrivals() -> None:
    turns = Turns()
    batch = turns.next(request("b", [1], priority=1), 10)
    urgent = turns.next(request("u", [1], priority=-1), 10)
    others = [turns.next(request("i", [1]), 10) for _ in range(2 * PRIORITY_STRIDE)]
    assert urgent < others[0] < batch < others[-1]
    assert sum(turn < batch for turn in others) <= PRIORITY_STRIDE


def test_batch_requests_come_longest_first_and_alike_together() -> None:
    turns = Turns()
    root = [7] * PREFIX_TOKENS
    asked = [([1], 50), ([*root, 1], 90), ([2], 100), ([*root, 2], 20), ([3], 80), ([*root, 3], 95)]
    ranked = sorted(
        (turns.next(request("b", prompt, priority=1), length), number) for number, (prompt, length) in enumerate(asked)
    )
    assert [number for _, number in ranked] == [2, 5, 1, 3, 4, 0]


def test_nobody_is_overtaken_from_beyond_the_window() -> None:
    turns = Turns()
    first = turns.next(request("b", [1], priority=1), 1)
    later = [turns.next(request("b", [1], priority=1), 1000) for _ in range(2 * PRIORITY_STRIDE)]
    assert sum(turn < first for turn in later) < PRIORITY_STRIDE


def test_who_gave_way_comes_first_among_equals() -> None:
    turns = Turns()
    long, short = (turns.next(request("b", [length], priority=1), length) for length in (100, 10))
    assert preferred((*short, 0)) < (*long, 0) < (*short, 0)
    assert preferred((*turns.next(request("b", [1], priority=2), 10), 0)) > (*short, 0)
