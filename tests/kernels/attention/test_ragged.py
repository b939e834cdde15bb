"""The attention entry for GPUs against its definition in fp64, under Triton's interpreter or on a GPU."""

import pytest
import torch

pytest.importorskip("triton")

from flashtensors.errors import ConfigError
from flashtensors.kernels.attention.ragged import ragged_attention
from flashtensors.kernels.attention.work import AttentionWork

from ..tolerances import DEVICE, DTYPES, assert_near
from .cases import OPTIONS, SHAPES, Case, assert_equal, check_fp8, share_prefixes, to_device


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_equals_the_definition(shape, dtype):
    case = Case(*shape, dtype)
    assert_equal(case.run(), case.expected())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_options_equal_the_definition(options, dtype):
    case = Case([150, 40, 64], [20, 3, 18], 4, 2, 64, 16, dtype)
    assert_equal(case.run(**options), case.expected(**options))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", [{}, *OPTIONS.values()], ids=["plain", *OPTIONS])
def test_fp8_caches_equal_the_definition(options, dtype):
    check_fp8(Case([150, 40, 64], [20, 3, 18], 4, 2, 64, 16, dtype), **options)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", [{}, *OPTIONS.values()], ids=["plain", *OPTIONS])
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim", "page"), [(4, 2, 64, 16), (3, 3, 128, 64), (4, 1, 256, 128)])
def test_many_rows_equal_the_definition(options, dtype, heads, kv_heads, head_dim, page):
    options = {**options, "sinks_H": options["sinks_H"][:heads]} if "sinks_H" in options else options
    case = Case([1500, 400, 180], [200, 3, 50], heads, kv_heads, head_dim, page, dtype)
    assert_equal(case.run(**options), case.expected(**options))


@pytest.mark.parametrize(("lengths", "new_tokens"), [([600], [500]), ([400, 260, 330], [300, 10, 200]), ([300], [300])])
def test_rows_of_a_window_that_is_not_causal_see_as_many_keys_as_stand_behind_them(lengths, new_tokens):
    case, options = Case(lengths, new_tokens, 4, 2, 64, 64, torch.float32), {"sliding_window": 70, "is_causal": False}
    assert_equal(case.run(**options), case.expected(**options))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tree_mask(dtype):
    case = Case([150, 40], [8, 5], 4, 2, 64, 16, dtype)
    tree = {"tree_mask_T": torch.tensor([1, 3, 5, 11, 17, 33, 65, 255, 1, 3, 7, 9, 17])}
    assert_equal(case.run(**tree), case.expected(**tree))


@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 1), (16, 1), (4, 4)])
def test_a_tree_mask_may_have_any_bits(heads, kv_heads, is_causal):
    """Also of tokens after the row's own: a causal row does not see them, whichever rows its tile has."""
    case = Case([150, 40], [8, 5], heads, kv_heads, 64, 16, torch.float32)
    bits = torch.randint(0, 1 << 16, (13,), generator=torch.Generator().manual_seed(0))
    tree = {"tree_mask_T": bits | 1, "is_causal": is_causal}
    assert_equal(case.run(**tree), case.expected(**tree))


GROUPS = {
    "one": ([[0, 3, 64]], {}),
    "two, and padding": ([[0, 2, 96], [0, 0, 0], [2, 3, 64], [0, 0, 0]], {}),
    "nested": ([[0, 5, 32], [1, 3, 64], [2, 2, 128]], {}),
    "ends before a long member": ([[0, 6, 64], [2, 4, 96]], {"tokens": [1, 1, 2, 20, 1, 1]}),
    "with a tree": ([[0, 4, 64]], {"tokens": [1, 2, 3, 1], "tree_mask_T": torch.tensor([1, 1, 3, 1, 3, 5, 1])}),
    "of empty sequences too": ([[0, 4, 64]], {"tokens": [1, 0, 3, 1]}),
    "with sinks and a cap": ([[0, 3, 64]], {"sinks_H": torch.tensor([0.5, -1.0, 2.0, 0.0]), "softcap": 2.0}),
    "longer than own keys": ([[0, 3, 448]], {"lengths": 480}),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim", "page"), [(4, 2, 64, 16), (3, 3, 128, 32)])
@pytest.mark.parametrize(("groups", "options"), GROUPS.values(), ids=GROUPS.keys())
def test_groups_change_no_result(groups, options, heads, kv_heads, head_dim, page, dtype):
    case, options = share_prefixes(groups, options, heads, kv_heads, head_dim, page, dtype)
    assert_equal(case.run(groups=groups, **options), case.expected(**options))


def test_keys_of_a_group_are_not_computed_by_its_members():
    case = Case([150, 157, 164], [1, 1, 1], 4, 2, 64, 16, torch.float32)
    case.share(0, 3, 64)
    work = case.work()
    case.run(groups=[[0, 2, 64]], work=work)
    items = work.short.items[: int(work.short.counts[0])].cpu()
    begins = {s: min(r[3] for r in items.tolist() if r[7] == s and r[2]) for s in range(3)}
    assert begins == {0: 64, 1: 64, 2: 0}


def test_groups_without_room_are_computed_by_their_members():
    tokens = [16] * 12
    case = Case([40 + 16] * 12, tokens, 4, 2, 64, 16, torch.float32)
    case.share(0, 12, 32)
    work = case.work(max_groups=1)
    assert work.group_table.max_tiles * work.long_tile.tokens < sum(tokens)
    assert_equal(case.run(groups=[[0, 12, 32]], work=work), case.expected())
    assert not work.group_table.own_begins.any()


def test_more_groups_than_the_work_holds_are_refused():
    case = Case([70, 70], [1, 1], 4, 2, 64, 16, torch.float32)
    with pytest.raises(ConfigError, match="max_groups"):
        case.run(groups=[[0, 0, 0]] * 2, work=case.work(max_groups=1))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_padding_is_left_as_it_is(dtype):
    case = Case([70, 33, 90], [1, 4, 20], 4, 2, 64, 16, dtype)
    expected = case.expected()[0]
    wide = torch.randn(40, 4, 64).to(dtype)
    wide[:25] = case.q
    out = torch.full((40, 4, 64), 7.0, dtype=dtype, device=DEVICE)
    work = AttentionWork(
        num_heads=4, num_kv_heads=2, head_dim=64, max_seqs=8, max_tokens=40, device=DEVICE, dtype=dtype
    )  # fmt: skip
    starts = torch.tensor([0, 1, 5, 25, 25, 25, 25], dtype=torch.int32)
    lengths = torch.tensor([70, 33, 90, 0, 0, 0], dtype=torch.int32)
    tables = torch.cat([case.tables, torch.full((3, case.tables.shape[1]), 1 << 20, dtype=torch.int32)])
    work.plan(to_device(starts), to_device(lengths))
    ragged_attention(
        to_device(wide), to_device(case.k), to_device(case.v), to_device(tables), work, scale=0.1, out_THD=out
    )
    assert_near(out[:25].cpu(), expected, "attention")
    assert (out[25:] == 7.0).all()


BATCHES = [
    ([1500, 400, 180, 64, 700], [1, 1, 1, 1, 1], [[0, 2, 128], [0, 0, 0]]),
    ([900, 399, 2, 0, 0], [1, 1, 1, 0, 0], [[0, 0, 0], [0, 0, 0]]),
    ([1100, 1000, 990, 700, 0], [1, 1, 1, 1, 0], [[0, 4, 64], [1, 2, 896]]),
]
MIXED = [
    ([1500, 400, 180, 64, 700], [100, 3, 1, 64, 300], [[0, 2, 128], [0, 0, 0]]),
    ([900, 399, 2, 0, 0], [1, 1, 1, 0, 0], [[0, 2, 320], [0, 0, 0]]),
    ([1100, 1000, 990, 900, 0], [1, 1, 4, 460, 0], [[0, 4, 64], [1, 2, 896]]),
]


@pytest.mark.gpu
@pytest.mark.parametrize("has_groups", [False, True])
@pytest.mark.parametrize("batches", [BATCHES, MIXED], ids=["decode", "mixed"])
def test_one_graph_serves_any_lengths(batches, has_groups):
    most = 1 if batches is BATCHES else None
    cases = [Case(lengths, tokens, 4, 2, 128, 64, torch.bfloat16) for lengths, tokens, _ in batches]
    num_rows = max(sum(tokens) for _, tokens, _ in batches)
    q = torch.zeros(num_rows, 4, 128, device=DEVICE, dtype=torch.bfloat16)
    k, v = (torch.zeros(80, 2, 64, 128, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    starts, lengths, groups = (torch.zeros(n, device=DEVICE, dtype=torch.int32) for n in (6, 5, (2, 3)))
    tables = torch.zeros(5, 24, device=DEVICE, dtype=torch.int32)
    out = torch.empty_like(q)
    work = AttentionWork(
        num_heads=4, num_kv_heads=2, head_dim=128, max_seqs=5, max_tokens=num_rows, device=DEVICE, max_groups=2
    )

    def step() -> None:
        work.plan(starts, lengths, groups=groups if has_groups else None, max_query_tokens=most)
        ragged_attention(q, k, v, tables, work, scale=0.1, out_THD=out)

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for case, (_, tokens, shared) in zip(cases, batches, strict=True):
        for first, count, prefix in shared:
            case.share(first, count, prefix)
        starts.copy_(case.starts)
        lengths.copy_(case.kv_lengths)
        groups.copy_(torch.tensor(shared))
        tables[:, : case.tables.shape[1]] = to_device(case.tables)
        k[: len(case.k)], v[: len(case.v)], q[: len(case.q)] = to_device(case.k), to_device(case.v), to_device(case.q)
        out.fill_(7.0)
        graph.replay()
        assert_near(out[: sum(tokens)].cpu(), case.expected()[0], "attention")
        assert (out[sum(tokens) :] == 7.0).all()


def test_no_rows_is_no_work():
    case = Case([5], [1], 4, 2, 64, 16, torch.float32)
    work = case.work()
    work.plan(torch.zeros(1, dtype=torch.int32, device=DEVICE), torch.zeros(0, dtype=torch.int32, device=DEVICE))
    out = ragged_attention(
        to_device(case.q[:0]), to_device(case.k), to_device(case.v), to_device(case.tables[:0]), work, scale=0.1
    )
    assert out.shape == (0, 4, 64)


def test_query_rows_may_be_strided():
    case = Case([70, 33], [1, 1], 4, 2, 64, 16, torch.float32)
    wide = torch.full((2, 8, 64), float("nan"))
    wide[:, :4] = case.q
    expected = case.expected()
    case.q = wide[:, :4]
    assert_equal(case.run(), expected)


def test_a_sink_of_no_weight_leaves_rows_that_see_nothing_at_zero() -> None:
    case = Case([0, 40], [1, 1], 2, 2, 64, 16, DTYPES[0])
    out, lse = case.run(sinks_H=torch.tensor([float("-inf"), 0.5]))
    assert not out[0].any()
    assert lse[0].tolist() == [float("-inf"), 0.5]
    assert out[1].isfinite().all()
