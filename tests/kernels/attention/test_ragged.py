"""The attention entry for GPUs against its definition in fp64, under Triton's interpreter or on a GPU."""

import pytest
import torch

pytest.importorskip("triton")

from flashtensors.errors import ConfigError
from flashtensors.kernels.attention.ragged import ragged_attention
from flashtensors.kernels.attention.work import AttentionWork

from ..tolerances import DEVICE, assert_near

DTYPES = [
    torch.float32,
    pytest.param(torch.float16, marks=pytest.mark.gpu),
    pytest.param(torch.bfloat16, marks=pytest.mark.gpu),
]
"""The interpreter's dot accumulates fp16 as the GPU does not, and its bf16 is wrong: those run on a GPU."""


class Case:
    """Random queries and a cache whose unused slots are NaN; sequence s has `lengths[s]` tokens, the last are new."""

    def __init__(self, lengths, new_tokens, heads, kv_heads, head_dim, page, dtype) -> None:
        generator = torch.Generator().manual_seed(0)
        self.lengths, self.new_tokens, self.page = lengths, new_tokens, page
        num_pages = [max(1, -(-length // page)) for length in lengths]
        total = sum(num_pages) + 3
        order = torch.randperm(total, generator=generator).int()
        self.tables = torch.full((len(lengths), max(num_pages)), int(order[-1]), dtype=torch.int32)
        is_used = torch.zeros(total, page, dtype=torch.bool)
        begin = 0
        for s, count in enumerate(num_pages):
            self.tables[s, :count] = order[begin : begin + count]
            begin += count
            for p in range(lengths[s]):
                is_used[self.tables[s, p // page], p % page] = True
        self.k, self.v = (
            torch.randn(total, kv_heads, page, head_dim, generator=generator)
            .masked_fill(~is_used[:, None, :, None], float("nan"))
            .to(dtype)
            for _ in range(2)
        )
        self.starts = torch.tensor([0, *torch.tensor(new_tokens).cumsum(0)], dtype=torch.int32)
        self.q = torch.randn(sum(new_tokens), heads, head_dim, generator=generator).to(dtype)
        self.kv_lengths = torch.tensor(lengths, dtype=torch.int32)

    def work(self, **options) -> AttentionWork:
        _, heads, head_dim = self.q.shape
        return AttentionWork(
            num_heads=heads, num_kv_heads=self.k.shape[1], head_dim=head_dim, max_seqs=len(self.lengths),
            max_tokens=len(self.q), device=DEVICE, dtype=self.q.dtype, max_kv_length=max(self.lengths), **options,
        )  # fmt: skip

    def share(self, first, count, prefix) -> None:
        """Give `count` sequences the first pages of the first of them."""
        pages = prefix // self.page
        self.tables[first : first + count, :pages] = self.tables[first, :pages].clone()

    def take_new_keys(self, caches) -> None:
        """Put NaN where the keys and values of new tokens are."""
        for s, (length, count) in enumerate(zip(self.lengths, self.new_tokens, strict=True)):
            for n in range(length - count, length):
                for cache in caches:
                    cache[self.tables[s, n // self.page], :, n % self.page] = float("nan")

    def run(self, *, groups=None, work=None, reads_ahead=False, **options):
        """Output and lse, computed twice over the same work: what the first run leaves must not harm the second."""
        named = {"sliding_window", "is_causal", "is_deterministic"}
        work = work or self.work(**{name: options.pop(name) for name in named & options.keys()})
        groups = None if groups is None else torch.tensor(groups, dtype=torch.int32, device=DEVICE)
        lse = torch.full(self.q.shape[:2], float("nan"), device=DEVICE)
        on_device = {name: _to(value) for name, value in options.items()}
        for _ in range(2):
            work.plan(_to(self.starts), _to(self.kv_lengths), groups=groups, reads_ahead=reads_ahead)
            out = ragged_attention(
                _to(self.q), _to(self.k), _to(self.v), _to(self.tables), work, scale=0.1, lse_TH=lse, **on_device
            )
        assert not work.short.arrivals.any(), "a merge was left unfinished"
        return out.cpu(), lse.cpu()

    def expected(self, *, sliding_window=None, is_causal=True, softcap=None, sinks_H=None, tree_mask_T=None,
                 is_deterministic=False):  # fmt: skip
        out = torch.zeros(self.q.shape, dtype=torch.float64)
        lse = torch.full(self.q.shape[:2], float("-inf"), dtype=torch.float64)
        group = self.q.shape[1] // self.k.shape[1]
        for s, (length, count) in enumerate(zip(self.lengths, self.new_tokens, strict=True)):
            n = torch.arange(length)
            pages = self.tables[s, n // self.page].long()
            k_LKD, v_LKD = (cache[pages, :, n % self.page].double() for cache in (self.k, self.v))
            for i in range(count):
                row, position = int(self.starts[s]) + i, length - count + i
                is_seen = n >= 0
                if tree_mask_T is not None:
                    drafted = n - (length - count)
                    is_seen &= (drafted < 0) | ((int(tree_mask_T[row]) >> drafted.clamp(min=0)) & 1).bool()
                elif is_causal:
                    is_seen &= n <= position
                if sliding_window is not None:
                    is_seen &= n > position - sliding_window
                for head in range(self.q.shape[1]):
                    scores = k_LKD[is_seen, head // group] @ self.q[row, head].double() * 0.1
                    if softcap is not None:
                        scores = softcap * torch.tanh(scores / softcap)
                    extra = scores.new_empty(0) if sinks_H is None else sinks_H[head : head + 1].double()
                    every = torch.cat([scores, extra])
                    if every.numel():
                        shares = torch.softmax(every, 0)[: scores.numel()]
                        out[row, head] = shares @ v_LKD[is_seen, head // group]
                        lse[row, head] = torch.logsumexp(every, 0)
        return out, lse


def _to(value):
    return value.to(DEVICE) if isinstance(value, torch.Tensor) else value


def _assert_close(got, expected) -> None:
    assert_near(got[0], expected[0], "attention")
    assert_near(got[1], expected[1], "log-sum-exp")


SHAPES = {
    "decode": ([70, 1, 33], [1, 1, 1], 8, 2, 64, 16),
    "odd group": ([150, 40, 18], [20, 1, 18], 6, 2, 64, 32),
    "one head each": ([150, 40, 18], [20, 1, 18], 4, 4, 128, 64),
    "one key head": ([90, 30], [30, 30], 4, 1, 128, 128),
    "wide heads": ([90, 30], [30, 30], 2, 2, 256, 64),
    "head dim 80": ([90, 30], [30, 30], 2, 1, 80, 16),
    "head dim 96": ([40, 30], [1, 30], 2, 1, 96, 32),
    "many rounds": ([70, 1, 33, 40, 9, 64, 65, 130, 16, 17, 90, 50, 31], [1] * 13, 4, 4, 64, 64),
    "empty sequences": ([0, 5, 0], [1, 2, 1], 4, 2, 64, 16),
    "one page": ([64], [3], 4, 2, 64, 64),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_equals_the_definition(shape, dtype):
    case = Case(*shape, dtype)
    _assert_close(case.run(), case.expected())


OPTIONS = {
    "window": {"sliding_window": 24},
    "soft cap": {"softcap": 2.0},
    "sinks": {"sinks_H": torch.tensor([0.5, -1.0, 2.0, 0.0])},
    "not causal": {"is_causal": False},
    "deterministic": {"is_deterministic": True},
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_options_equal_the_definition(options, dtype):
    case = Case([150, 40, 64], [20, 3, 18], 4, 2, 64, 16, dtype)
    _assert_close(case.run(**options), case.expected(**options))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", [{}, *OPTIONS.values()], ids=["plain", *OPTIONS])
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim", "page"), [(4, 2, 64, 16), (3, 3, 128, 64), (4, 1, 256, 128)])
def test_many_rows_equal_the_definition(options, dtype, heads, kv_heads, head_dim, page):
    options = {**options, "sinks_H": options["sinks_H"][:heads]} if "sinks_H" in options else options
    case = Case([1500, 400, 180], [200, 3, 50], heads, kv_heads, head_dim, page, dtype)
    _assert_close(case.run(**options), case.expected(**options))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tree_mask(dtype):
    case = Case([150, 40], [8, 5], 4, 2, 64, 16, dtype)
    tree = {"tree_mask_T": torch.tensor([1, 3, 5, 11, 17, 33, 65, 255, 1, 3, 7, 9, 17])}
    _assert_close(case.run(**tree), case.expected(**tree))


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
    options = dict(options)
    tokens = options.pop("tokens", [1, 1, 1, 1, 1])
    length = options.pop("lengths", 150)
    if "sinks_H" in options:
        options["sinks_H"] = options["sinks_H"][:heads]
    case = Case([length + 7 * s for s in range(len(tokens))], tokens, heads, kv_heads, head_dim, page, dtype)
    for first, count, prefix in groups:
        case.share(first, count, prefix)
    _assert_close(case.run(groups=groups, **options), case.expected(**options))


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
    _assert_close(case.run(groups=[[0, 12, 32]], work=work), case.expected())
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
    work.plan(_to(starts), _to(lengths))
    ragged_attention(_to(wide), _to(case.k), _to(case.v), _to(tables), work, scale=0.1, out_THD=out)
    assert_near(out[:25].cpu(), expected, "attention")
    assert (out[25:] == 7.0).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_deterministic_result_does_not_depend_on_the_batch(dtype):
    case = Case([150, 1500, 70], [1, 1, 20], 4, 2, 64, 16, dtype)
    together, _ = case.run(is_deterministic=True)
    alone = Case([150, 1500, 70], [1, 1, 20], 4, 2, 64, 16, dtype)
    for s, rows in enumerate([slice(0, 1), slice(1, 2), slice(2, 22)]):
        work = AttentionWork(
            num_heads=4, num_kv_heads=2, head_dim=64, max_seqs=1, max_tokens=32, device=DEVICE, dtype=dtype,
            is_deterministic=True, max_kv_length=1500,
        )  # fmt: skip
        starts = torch.tensor([0, rows.stop - rows.start], dtype=torch.int32)
        work.plan(_to(starts), _to(alone.kv_lengths[s : s + 1].clone()))
        table = _to(alone.tables[s : s + 1].clone())
        out = ragged_attention(_to(alone.q[rows].clone()), _to(alone.k), _to(alone.v), table, work, scale=0.1)
        assert torch.equal(out.cpu(), together[rows])


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
        tables[:, : case.tables.shape[1]] = _to(case.tables)
        k[: len(case.k)], v[: len(case.v)], q[: len(case.q)] = _to(case.k), _to(case.v), _to(case.q)
        out.fill_(7.0)
        graph.replay()
        assert_near(out[: sum(tokens)].cpu(), case.expected()[0], "attention")
        assert (out[sum(tokens) :] == 7.0).all()


def test_no_rows_is_no_work():
    case = Case([5], [1], 4, 2, 64, 16, torch.float32)
    work = case.work()
    work.plan(torch.zeros(1, dtype=torch.int32, device=DEVICE), torch.zeros(0, dtype=torch.int32, device=DEVICE))
    out = ragged_attention(_to(case.q[:0]), _to(case.k), _to(case.v), _to(case.tables[:0]), work, scale=0.1)
    assert out.shape == (0, 4, 64)


def test_query_rows_may_be_strided():
    case = Case([70, 33], [1, 1], 4, 2, 64, 16, torch.float32)
    wide = torch.full((2, 8, 64), float("nan"))
    wide[:, :4] = case.q
    expected = case.expected()
    case.q = wide[:, :4]
    _assert_close(case.run(), expected)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda case: setattr(case, "q", case.q[:, :, :32]), "q_THD"),
        (lambda case: setattr(case, "k", case.k.transpose(1, 2)), "k_cache"),
        (lambda case: setattr(case, "v", case.v.half()), "v_cache"),
        (lambda case: setattr(case, "tables", case.tables.long()), "block_tables"),
    ],
)
def test_what_does_not_fit_is_named(change, named):
    case = Case([70, 33], [1, 1], 4, 2, 64, 16, torch.float32)
    work = case.work()
    change(case)
    with pytest.raises(ConfigError, match=named):
        case.run(work=work)


def test_more_sequences_than_a_plan_takes_are_refused():
    with pytest.raises(ConfigError, match="max_seqs is 4097"):
        AttentionWork(num_heads=2, num_kv_heads=1, head_dim=16, max_seqs=4097, max_tokens=4097, device=DEVICE)
