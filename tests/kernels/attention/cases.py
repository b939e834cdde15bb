"""Random batches over a paged cache, and attention over them by its definition in fp64."""

import torch

from flashtensors.kernels.attention.ragged import ragged_attention
from flashtensors.kernels.attention.work import SHORT_TOKENS, AttentionWork

from ..tolerances import DEVICE, assert_near

FP8 = torch.float8_e4m3fn


OPTIONS = {
    "window": {"sliding_window": 24},
    "soft cap": {"softcap": 2.0},
    "sinks": {"sinks_H": torch.tensor([0.5, -1.0, 2.0, 0.0])},
    "not causal": {"is_causal": False},
    "window, not causal": {"sliding_window": 24, "is_causal": False},
    "deterministic": {"is_deterministic": True},
}


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

    def run(self, *, groups=None, work=None, reads_ahead=False, attend=ragged_attention, **options):
        """Output and lse, computed twice over the same work: what the first run leaves must not harm the second."""
        work = work or self.work(**take_work_options(options))
        groups = None if groups is None else torch.tensor(groups, dtype=torch.int32, device=DEVICE)
        lse = torch.full(self.q.shape[:2], float("nan"), device=DEVICE)
        on_device = {name: to_device(value) for name, value in options.items()}
        for _ in range(2):
            work.plan(
                to_device(self.starts), to_device(self.kv_lengths), groups=groups, reads_ahead=reads_ahead,
                max_query_tokens=SHORT_TOKENS if "tree_mask_T" in options else None,
            )  # fmt: skip
            caches = to_device(self.k), to_device(self.v)
            out = attend(to_device(self.q), *caches, to_device(self.tables), work, scale=0.1, lse_TH=lse, **on_device)
        assert not (work.has_kernels and work.short.arrivals.any()), "a merge was left unfinished"
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
                if is_causal:
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


def share_prefixes(groups, options, heads, kv_heads, head_dim, page, dtype) -> tuple[Case, dict]:
    """A batch whose sequences share what `groups` say, and the options that are not of its lengths."""
    options = dict(options)
    tokens = options.pop("tokens", [1, 1, 1, 1, 1])
    length = options.pop("lengths", 150)
    if "sinks_H" in options:
        options["sinks_H"] = torch.linspace(-1, 2, heads)
    case = Case([length + 7 * s for s in range(len(tokens))], tokens, heads, kv_heads, head_dim, page, dtype)
    for first, count, prefix in groups:
        case.share(first, count, prefix)
    return case, options


def to_device(value):
    return value.to(DEVICE) if isinstance(value, torch.Tensor) else value


def assert_equal(got, expected) -> None:
    assert_near(got[0], expected[0], "attention")
    assert_near(got[1], expected[1], "log-sum-exp")


def take_work_options(options) -> dict:
    """Take those of `options` that belong to `AttentionWork`."""
    return {name: options.pop(name) for name in {"sliding_window", "is_causal", "is_deterministic"} & options.keys()}


def check_fp8(case: Case, *, groups=None, attend=ragged_attention, **options) -> None:
    """Hold a run over the case's cache in fp8, with factors by key head, to the definition over what it holds."""
    num_kv_heads = case.k.shape[1]
    factors = {
        "k_scales_K": torch.linspace(0.5, 1.5, num_kv_heads),
        "v_scales_K": torch.linspace(2.0, 0.7, num_kv_heads),
    }
    k, v = case.k.to(FP8), case.v.to(FP8)
    case.k, case.v = (
        cache.double() * factor[:, None, None] for cache, factor in zip((k, v), factors.values(), strict=True)
    )
    expected = case.expected(**options)
    case.k, case.v = k, v
    work = case.work(kv_dtype=FP8, **take_work_options(options))
    assert_equal(case.run(groups=groups, work=work, attend=attend, **factors, **options), expected)
