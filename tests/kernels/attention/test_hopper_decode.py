"""The streaming decode kernel against its definition in fp64: its logic on the CPU, itself on a GPU."""

import random
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from flashtensors.kernels.attention import hopper_decode_kernel, work
from flashtensors.kernels.attention.hopper_decode import TAIL
from flashtensors.kernels.attention.stream_queue import GRAIN, TILE_INTS, StreamQueue
from flashtensors.kernels.attention.tiles import stream_tiles

from ..compile_apart import compile_apart
from ..tolerances import DEVICE, assert_near
from .cases import Case
from .gluon_on_cpu import Barriers, Descriptor, Pointer, Shared, partition, run_program
from .test_ragged import GROUPS

SCRIPT = Path(__file__).parent / "compile_stream_for_hopper.py"
SHARED_BYTES, REGISTERS = 228 << 10, 1 << 16
"""Of a multiprocessor; a program takes 1 KB of shared memory more than it asks for."""
LOG2_E = 1.4426950408889634


def stream(case: Case, *, num_programs: int, slots: int = 3, rows: int = 16, block_n: int = 64, sliding_window=None,
           is_causal=True, softcap=None, sinks_H=None, tree_mask_T=None, reads_ahead=False):  # fmt: skip
    """Output and lse of all programs, one after the other in a random order.

    With `reads_ahead`, a program's new keys and values are not there until its warp of loads waits for them.
    """
    _, heads, head_dim = case.q.shape
    _, kv_heads, page, _ = case.k.shape
    group = heads // kv_heads
    queue = StreamQueue(
        max_seqs=len(case.lengths), max_rows=len(case.q), num_heads=kv_heads, head_dim=head_dim,
        tile_tokens=rows // group, tile_rows=16, num_programs=num_programs, device="cpu",
    )  # fmt: skip
    queue.fill(case.starts, case.kv_lengths, max_tokens=16, is_causal=is_causal, window=sliding_window)
    queue.partial_out.fill_(float("nan"))
    queue.partial_sums.fill_(float("nan"))
    out, lse = torch.full_like(case.q, float("nan")), torch.full(case.q.shape[:2], float("nan"))
    caches = [cache.clone() for cache in (case.k, case.v)]
    k_desc, v_desc = (Descriptor(cache.view(-1, head_dim)) for cache in caches)
    sinks, tree = (None if x is None else Pointer(x) for x in (sinks_H, tree_mask_T))
    tiles, starts = Pointer(queue.tiles), Pointer(queue.starts)

    def append() -> None:
        for cache, whole in zip(caches, (case.k, case.v), strict=True):
            cache.copy_(whole)

    def run(program: int) -> None:
        if reads_ahead:
            case.take_new_keys(caches)
        kernel = partition(hopper_decode_kernel, program)
        loads = partition(hopper_decode_kernel, program, wait=append)
        full, empty = Barriers(slots), Barriers(slots)
        ring = Shared(torch.full((slots, block_n, head_dim), float("nan")))
        run_program(
            lambda: loads["_load_share"](
                k_desc, v_desc, k_desc, v_desc, Pointer(case.tables), tiles, starts, full, empty, ring,
                case.tables.stride(0), kv_heads, page, block_n, head_dim, slots, GRAIN, TILE_INTS, TAIL, reads_ahead,
            ),
            lambda: kernel["_attend_share"](
                Pointer(case.q), Pointer(out), Pointer(lse), sinks, tree, tiles, starts, Pointer(queue.share),
                Pointer(queue.partial_out), Pointer(queue.partial_sums), Pointer(queue.arrivals), full, empty, ring,
                0.1 * LOG2_E, (softcap or 1.0) * LOG2_E, sliding_window or 0, case.q.stride(0), case.q.stride(1),
                out.stride(0), out.stride(1), kv_heads, group, rows, block_n, head_dim, slots, GRAIN, TILE_INTS,
                is_causal, sliding_window is not None, softcap is not None, tree is not None, sinks is not None, True,
                reads_ahead,
            ),
        )  # fmt: skip

    for program in random.Random(0).sample(range(num_programs), num_programs):
        run(program)
    assert not queue.arrivals.any(), "a merge was left unfinished"
    return out, lse


def _assert_close(got, expected) -> None:
    assert_near(got[0], expected[0], "attention")
    assert_near(got[1], expected[1], "log-sum-exp")


SHAPES = {
    "decode": ([700, 1, 330, 64, 65], [1, 1, 1, 1, 1], 8, 2, 64, 16),
    "append": ([150, 40, 70, 500], [9, 16, 8, 3], 4, 2, 64, 64),
    "odd group": ([150, 40, 18], [7, 1, 2], 6, 2, 64, 32),
    "one head each": ([300, 40], [1, 3], 3, 3, 128, 128),
    "empty sequences": ([0, 5, 0, 200], [1, 2, 1, 0], 4, 2, 64, 16),
}
needs_cpu = pytest.mark.skipif(DEVICE != "cpu", reason="the queue is filled by Triton's interpreter")


@needs_cpu
@pytest.mark.parametrize("num_programs", [1, 5, 40])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_logic_equals_the_definition(shape, num_programs) -> None:
    case = Case(*shape, torch.float32)
    _assert_close(stream(case, num_programs=num_programs), case.expected())


OPTIONS = {
    "window": {"sliding_window": 100},
    "soft cap": {"softcap": 2.0},
    "sinks": {"sinks_H": torch.tensor([0.5, -1.0, 2.0, 0.0])},
    "not causal": {"is_causal": False},
    "tree": {"tree_mask_T": torch.tensor([1, 3, 5, 11, 17, 33, 65, 255, 1, 3, 7, 9, 17, 1])},
    "tree with bits of later rows": {
        "tree_mask_T": torch.tensor([255, 3, 69, 11, 17, 161, 65, 255, 31, 3, 7, 25, 17, 1])
    },
}


@needs_cpu
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_logic_with_options_equals_the_definition(options) -> None:
    case = Case([350, 240, 64], [8, 5, 1], 4, 2, 64, 16, torch.float32)
    _assert_close(stream(case, num_programs=11, **options), case.expected(**options))


@needs_cpu
@pytest.mark.parametrize("num_programs", [1, 9])
def test_new_keys_are_not_read_before_they_are_there(num_programs) -> None:
    case = Case([640, 1, 330, 64, 65, 128], [1, 1, 9, 1, 1, 2], 8, 2, 64, 16, torch.float32)
    _assert_close(stream(case, num_programs=num_programs, reads_ahead=True), case.expected())


@needs_cpu
@pytest.mark.parametrize("rows", [2, 4])
def test_logic_with_few_rows_and_many_pieces(rows) -> None:
    case = Case([3000, 70], [1, 1], 2 * rows, 2, 64, 64, torch.float32)
    _assert_close(stream(case, num_programs=90, rows=rows), case.expected())


@needs_cpu
@pytest.mark.parametrize("block_n", [32, 128])
@pytest.mark.parametrize("page", [16, 32, 64, 128])
def test_logic_with_steps_of_other_lengths_than_a_grain(page, block_n) -> None:
    case = Case([350, 64, 33], [1, 8, 1], 4, 2, 64, page, torch.float32)
    _assert_close(stream(case, num_programs=6, block_n=block_n, slots=5), case.expected())


@pytest.mark.parametrize("reads", ["ahead", "behind"])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_compiles_so_that_programs_fit_a_multiprocessor(head_dim, reads, tmp_path) -> None:
    found, tiles = compile_apart(SCRIPT, head_dim, reads, cache=tmp_path), stream_tiles(head_dim)
    assert (found["shared_bytes"] + 1024) * tiles.programs <= SHARED_BYTES
    assert found["num_warps"] * 32 * tiles.registers * tiles.programs <= REGISTERS
    assert found["stack_bytes"] == 0, "registers are spilled"
    assert found["mma.sync"] > 0
    assert found["ldmatrix"] > 0, "shared memory is read number by number"
    assert found["cp.async.bulk.tensor"] > 0
    assert found["griddepcontrol.wait"] > 0


@pytest.fixture
def _streams_always(monkeypatch) -> None:
    monkeypatch.setattr(work, "does_stream_pay", lambda *shape: True)


@pytest.mark.gpu
@pytest.mark.usefixtures("_streams_always")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim", "page"), [(4, 2, 64, 16), (8, 4, 128, 64), (4, 1, 256, 128)])
@pytest.mark.parametrize("options", [{}, *OPTIONS.values()], ids=["plain", *OPTIONS])
def test_equals_the_definition(options, heads, kv_heads, head_dim, page, dtype) -> None:
    options = {**options, "sinks_H": torch.linspace(-1, 2, heads)} if "sinks_H" in options else options
    case = Case([3500, 240, 64], [8, 5, 1], heads, kv_heads, head_dim, page, dtype)
    named = {name: value for name, value in options.items() if name in ("sliding_window", "is_causal")}
    planned = case.work(**named)
    rest = {name: value for name, value in options.items() if name not in named}
    _assert_close(case.run(work=planned, **rest), case.expected(**options))
    assert planned.stream is not None
    assert not planned.stream.arrivals.any()


@pytest.mark.gpu
@pytest.mark.usefixtures("_streams_always")
@pytest.mark.parametrize("reads_ahead", [False, True])
@pytest.mark.parametrize("num_seqs", [1, 8, 70, 300])
def test_decodes_equal_the_definition(num_seqs, reads_ahead) -> None:
    lengths = [random.Random(s).randint(1, 1500) for s in range(num_seqs)]
    case = Case(lengths, [1] * num_seqs, 8, 1, 128, 64, torch.bfloat16)
    planned = case.work()
    _assert_close(case.run(work=planned, reads_ahead=reads_ahead), case.expected())
    assert planned.has_stream


@pytest.mark.gpu
@pytest.mark.parametrize(("groups", "options"), [GROUPS["one"]])
def test_groups_go_to_the_split_kernel(groups, options) -> None:
    case = Case([150, 157, 164], [1, 1, 1], 4, 2, 64, 16, torch.bfloat16)
    case.share(*groups[0])
    planned = case.work()
    _assert_close(case.run(groups=groups, work=planned, **options), case.expected(**options))
    _assert_close(case.run(work=planned, **options), case.expected(**options))
