"""Steps made on the device against steps made span by span on the host."""

from __future__ import annotations

import numpy as np
import pytest
import torch

pytest.importorskip("triton")

from flashtensors.kernels.step_rows import (
    APPEND_INTS,
    FIRST_STOP,
    HEADER_INTS,
    MIN_LENGTH,
    NUM_FIELDS,
    NUM_STOPS,
    SEED,
    SPAN_INTS,
    START_INTS,
    TEMPERATURE,
    TOP_K,
    TOP_P,
    SlotState,
    StepRows,
    append_blocks,
    expand_spans,
    expand_spans_reference,
    fetch_message,
    fetch_words,
    note_drawn,
    start_slots,
)

NUM_SLOTS, MAX_LENGTH, BLOCK_SIZE = 6, 700, 16
MAX_BLOCKS = -(-MAX_LENGTH // BLOCK_SIZE)
DEVICES = [
    pytest.param("cpu", marks=pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are compiled here")),
    pytest.param("cuda", marks=pytest.mark.gpu),
]


def random_state(device: str) -> SlotState:
    generator = torch.Generator().manual_seed(0)
    fields = torch.randint(0, 1000, (NUM_SLOTS, NUM_FIELDS), generator=generator)
    for place in (TEMPERATURE, TOP_P, TOP_P + 1):
        fields[:, place] = torch.rand(NUM_SLOTS, generator=generator, dtype=torch.float64).view(torch.int64)
    return SlotState(
        token_ids_NL=torch.randint(0, 9999, (NUM_SLOTS, MAX_LENGTH), generator=generator).int().to(device),
        block_tables_NB=torch.randint(0, 10**6, (NUM_SLOTS, MAX_BLOCKS), generator=generator).int().to(device),
        fields_NW=fields.to(device),
    )


def message_of(spans: list[tuple[int, int, int, int]], num_seqs: int) -> torch.Tensor:
    message = torch.full((HEADER_INTS + SPAN_INTS * num_seqs,), 12345, dtype=torch.int32)
    rows, first = [], 0
    for span in spans:
        rows.append((*span, first))
        first += span[2]
    message[:3] = torch.tensor([0, len(spans), first])
    message[HEADER_INTS : HEADER_INTS + SPAN_INTS * len(rows)] = torch.tensor(rows, dtype=torch.int32).flatten()
    return message


def on_host(rows: StepRows) -> dict[str, torch.Tensor]:
    names = [name for name in rows.__dataclass_fields__ if name != "sampling"]
    tensors = {name: getattr(rows, name).cpu() for name in names}
    return tensors | {name: getattr(rows.sampling, name).cpu() for name in rows.sampling.__dataclass_fields__}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("spans", "num_rows", "num_seqs"),
    [
        ([(3, 40, 1, 1), (0, 0, 1, 1), (5, 698, 1, 0)], 4, 4),
        ([(1, 0, 650, 1)], 650, 1),
        ([(1, 7, 300, 0), (4, 15, 1, 1), (2, 16, 17, 1)], 512, 5),
    ],
)
def test_rows_equal_those_made_on_the_host(
    device: str, spans: list[tuple[int, int, int, int]], num_rows: int, num_seqs: int
) -> None:
    state, message = random_state(device), message_of(spans, num_seqs)
    buffers = StepRows.empty(1024, 8, MAX_BLOCKS, device)
    for tensor in (buffers.token_ids_T, buffers.last_rows_S, buffers.kv_lengths_S, buffers.query_starts):
        tensor.fill_(777)  # what an earlier step left
    rows = buffers.first(num_rows, num_seqs)
    expand_spans(state, message.to(device), rows, block_size=BLOCK_SIZE)
    host_state = SlotState(**{name: getattr(state, name).cpu() for name in state.__dataclass_fields__})
    expected = on_host(expand_spans_reference(host_state, message, rows, block_size=BLOCK_SIZE))
    actual = on_host(rows)
    for s in range(num_seqs):  # beyond a sequence's blocks, its table may hold anything
        num_blocks = -(-int(expected["kv_lengths_S"][s]) // BLOCK_SIZE)
        actual["block_tables_SB"][s, num_blocks:] = 0
    expected["position_S"][len(spans) :] = 0
    for name, tensor in expected.items():
        assert torch.equal(actual[name], tensor), name
    assert (buffers.token_ids_T[num_rows:] == 777).all()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("num_words", [1, 512, 513, 100_003])
def test_words_of_host_memory_are_fetched_as_they_are_when_the_stream_comes_to_them(
    device: str, num_words: int
) -> None:
    host = torch.zeros(num_words + 1, dtype=torch.int32, pin_memory=device == "cuda")
    fetched = torch.zeros(num_words + 1, dtype=torch.int32, device=device)
    for turn in range(3):
        host.copy_(torch.arange(num_words + 1) + 1000 * turn)
        fetch_words(host[:num_words], fetched[:num_words])
        assert torch.equal(fetched[:num_words].cpu(), host[:num_words]), turn
        assert fetched[num_words] == 0, "a word too many"


@pytest.mark.parametrize("device", DEVICES)
def test_messages_are_fetched_in_turns(device: str) -> None:
    for num_ints in (8, 9000):
        messages = torch.empty((3, num_ints), dtype=torch.int32, pin_memory=device == "cuda")
        turn = torch.tensor([1, 0], dtype=torch.int32, device=device)
        for step in range(4):
            sent = messages[(step + 1) % 3]
            sent.copy_(torch.arange(num_ints) + 10_000 * step)
            fetched = torch.full((num_ints + 1,), -1, dtype=torch.int32, device=device)
            fetch_message(messages, turn, fetched[:-1])
            assert torch.equal(fetched[:-1].cpu(), sent)
            assert fetched[-1] == -1, "a word too many"
            assert turn.tolist() == [(step + 2) % 3, 0]


@pytest.mark.parametrize("device", DEVICES)
def test_starts_and_appends_reach_their_slots_alone(device: str) -> None:
    state = random_state(device)
    before = {name: getattr(state, name).cpu().clone() for name in state.__dataclass_fields__}
    tokens = {2: np.arange(600, dtype=np.int32), 5: np.arange(1000, 1003, dtype=np.int32)}
    starts = np.zeros((2, START_INTS), dtype=np.int64)
    starts[0] = [2, 600, 0, *range(100, 100 + NUM_FIELDS)]
    starts[1] = [5, 3, 600, *range(200, 200 + NUM_FIELDS)]
    start_slots(
        state, torch.from_numpy(starts).to(device), torch.from_numpy(np.concatenate([*tokens.values()])).to(device)
    )
    appends = [(2, index, 5000 + index) for index in range(MAX_BLOCKS)] + [(0, 3, 77)]
    counts = torch.tensor([len(appends), 0], dtype=torch.int32, device=device)
    rows = torch.tensor([*appends, (1, 1, 1)], dtype=torch.int32, device=device)
    assert rows.shape[1] == APPEND_INTS
    append_blocks(state, counts, rows)
    for slot, token_ids in tokens.items():
        before["token_ids_NL"][slot, : len(token_ids)] = torch.from_numpy(token_ids)
    before["fields_NW"][2], before["fields_NW"][5] = torch.arange(100, 116), torch.arange(200, 216)
    before["block_tables_NB"][2] = torch.arange(5000, 5000 + MAX_BLOCKS)
    before["block_tables_NB"][0, 3] = 77
    for name, tensor in before.items():
        assert torch.equal(getattr(state, name).cpu(), tensor), name


@pytest.mark.parametrize("device", DEVICES)
def test_drawn_tokens_go_to_their_slots_and_end_answers_in_time(device: str) -> None:
    state = random_state(device)
    state.fields_NW[:, FIRST_STOP:] = torch.tensor([11, 22, *[-1] * (NUM_STOPS - 2)])
    state.fields_NW[:, MIN_LENGTH] = 50
    spans = [(0, 49, 1, 1), (1, 48, 1, 1), (2, 60, 4, 0), (3, 60, 1, 1), (4, 60, 1, 1)]
    message = message_of(spans, 8).to(device)
    rows = StepRows.empty(16, 8, MAX_BLOCKS, device)
    expand_spans(state, message, rows, block_size=BLOCK_SIZE)
    before = state.token_ids_NL.cpu().clone()
    tokens = torch.tensor([11, 22, 11, 33, 22, 1, 1, 1], device=device)
    is_valid = torch.tensor([True, True, True, True, False, True, True, True], device=device)
    message[3] = 1  # the second host buffer
    drawn_BS2 = torch.full((2, 10, 2), 9, dtype=torch.int32, pin_memory=device == "cuda")
    note_drawn(state, message, rows, tokens, is_valid, drawn_BS2)
    if device == "cuda":
        torch.cuda.synchronize()
    # slot 0: a stop at position 50; slot 1: too early; slot 2: draws nothing; slot 4: no numbers
    assert drawn_BS2[1, :5].tolist() == [[11, 1], [22, 0], [-1, 0], [33, 0], [-1, 0]]
    assert (drawn_BS2[0] == 9).all()
    assert (drawn_BS2[1, 8:] == 9).all(), "rows behind the bucket's were written"
    before[0, 50], before[1, 49], before[3, 61] = 11, 22, 33
    before[4, 61] = state.token_ids_NL[4, 61].cpu()
    assert torch.equal(state.token_ids_NL.cpu(), before)
    assert SEED < MIN_LENGTH < FIRST_STOP
    assert TOP_K == TEMPERATURE + 1
