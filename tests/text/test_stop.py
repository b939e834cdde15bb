"""Stop strings against the naive search: look at every prefix of the text."""

from hypothesis import given
from hypothesis import strategies as st

from flashtensors.text.stop import StopMatcher

_TEXT = st.text(alphabet="ab", max_size=24)
_STOPS = st.lists(st.text(alphabet="ab", min_size=1, max_size=6), min_size=1, max_size=4)


def naive_match(text: str, stops: list[str]) -> tuple[str, int] | None:
    for end in range(1, len(text) + 1):
        ending = [stop for stop in stops if text[:end].endswith(stop)]
        if ending:
            return max(ending, key=len), end
    return None


def naive_num_held(text: str, stops: list[str]) -> int:
    return max(size for stop in stops for size in range(len(stop)) if text.endswith(stop[:size]))


@given(st.lists(_TEXT, max_size=5), _STOPS)
def test_matcher_finds_what_a_look_at_every_prefix_finds(pieces: list[str], stops: list[str]) -> None:
    matcher = StopMatcher(stops)
    read = ""
    for piece in pieces:
        match = matcher.feed(piece)
        expected = naive_match(read + piece, stops)
        if match is not None:
            assert (match.stop, len(read) + match.end) == expected
            return
        assert expected is None
        read += piece
        assert matcher.num_held == naive_num_held(read, stops)


def test_longer_of_two_stops_that_end_together_wins() -> None:
    match = StopMatcher(["c", "abc"]).feed("xabcx")
    assert match is not None
    assert match == ("abc", 4)


def test_stop_completed_first_wins_over_one_that_begins_earlier() -> None:
    match = StopMatcher(["abcd", "bc"]).feed("abcd")
    assert match == ("bc", 3)
