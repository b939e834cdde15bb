"""Products of few rows with a weight on Hopper's matrix units, in Gluon: what counts is to read the weight once, soon.

The weight's rows are the M of the matrix units and the tokens their N, so eight tokens cost no more than they must. A
program streams chunks of `BLOCK_O x BLOCK_I` of the weight, and of the rows beside them, through a ring in shared
memory: one warp loads them with the tensor memory accelerator, a warpgroup multiplies.

Weights do not depend on the kernel in front. With programmatic dependent launch the loading warp fills the whole ring
with weights first and only then waits for that kernel, so that launch, first reads and the other's last programs cost
next to nothing; and it lets the kernel behind start at once.

Chunks of all tiles are one line, of which every program takes an equal part (stream-K: Osama and others, 2023). A
program that has only a part of a tile's chunks leaves its fp32 sums; the last of a tile's programs to arrive adds them
up in the order of the chunks, so the result does not depend on who was last.

Shapes: T rows, I inputs, O outputs.
"""

# pyright: reportMissingParameterType=false, reportGeneralTypeIssues=false, reportCallIssue=false
# pyright: reportIndexIssue=false, reportArgumentType=false, reportOperatorIssue=false, reportAttributeAccessIssue=false
# pyright: reportAssignmentType=false

from __future__ import annotations

import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma, warpgroup_mma_wait

from .gluon_barriers import make_barriers
from .gluon_names import load_tile, wait_for_partition


@gluon.jit
def _first_chunk(program, num_programs, num_tiles, chunks, IS_SPLIT: gl.constexpr):
    """Where the part of a program begins, and that of the one before it ends."""
    if IS_SPLIT:
        return program * (num_tiles * chunks) // num_programs
    return program * num_tiles // num_programs * chunks


@gluon.jit
def _load_weight(w_desc, chunk, chunks, full, w_s, i, NUM_BYTES: gl.constexpr, BLOCK_O: gl.constexpr,
                 BLOCK_I: gl.constexpr, STAGES: gl.constexpr):  # fmt: skip
    tile = chunk // chunks
    mbarrier.expect(full.index(i % STAGES), NUM_BYTES)
    load_tile(
        w_desc, [tile * BLOCK_O, (chunk - tile * chunks) * BLOCK_I], full.index(i % STAGES), w_s.index(i % STAGES)
    )


@gluon.jit
def _load(w_desc, x_desc, full, empty, w_s, x_s, num_tiles, chunks, IS_SPLIT: gl.constexpr, STAGES: gl.constexpr):
    """The loading warp: fill the ring with weights, wait, then follow with the rows."""
    BLOCK_O: gl.constexpr = w_desc.block_type.shape[0]
    BLOCK_I: gl.constexpr = w_desc.block_type.shape[1]
    NUM_BYTES: gl.constexpr = w_desc.block_type.nbytes + x_desc.block_type.nbytes
    begin = _first_chunk(gl.program_id(0), gl.num_programs(0), num_tiles, chunks, IS_SPLIT)
    num_chunks = _first_chunk(gl.program_id(0) + 1, gl.num_programs(0), num_tiles, chunks, IS_SPLIT) - begin
    tl.extra.cuda.gdc_launch_dependents()
    num_early = gl.minimum(num_chunks, STAGES)
    for i in range(num_early):
        _load_weight(w_desc, begin + i, chunks, full, w_s, i, NUM_BYTES, BLOCK_O, BLOCK_I, STAGES)
    tl.extra.cuda.gdc_wait()
    for i in range(num_early):
        at = (begin + i) % chunks * BLOCK_I
        load_tile(x_desc, [0, at], full.index(i), x_s.index(i))
    for i in range(num_early, num_chunks):
        s = i % STAGES
        mbarrier.wait(empty.index(s), (i // STAGES & 1) ^ 1)
        _load_weight(w_desc, begin + i, chunks, full, w_s, i, NUM_BYTES, BLOCK_O, BLOCK_I, STAGES)
        at = (begin + i) % chunks * BLOCK_I
        load_tile(x_desc, [0, at], full.index(s), x_s.index(s))


@gluon.jit
def _add_partials(acc, partials, places, first, last, NUM_ELEMENTS: gl.constexpr, AT_ONCE: gl.constexpr):
    """Sums of a tile's programs `first` to `last`, in this order; `places` are those of elements in a tile."""
    for program in range(first, last + 1, AT_ONCE):
        for i in gl.static_range(AT_ONCE):
            is_there = program + i <= last
            slot = (program + i) * 2 + (program + i == first).to(gl.int32)
            part_ptr = partials + slot.to(gl.int64) * NUM_ELEMENTS
            part = gl.load(part_ptr + places, mask=is_there & (places >= 0), other=0.0, cache_modifier=".cg")
            acc = acc + part
    return acc


@gluon.jit
def _store(acc, out_ptr, bias_ptr, tile, num_rows, num_outputs, HAS_BIAS: gl.constexpr,
           layout: gl.constexpr):  # fmt: skip
    """Rows of a tile, transposed, with the bias of their output."""
    BLOCK_O: gl.constexpr = acc.shape[0]
    BLOCK_T: gl.constexpr = acc.shape[1]
    dtype: gl.constexpr = out_ptr.dtype.element_ty
    if HAS_BIAS:
        b = tile * BLOCK_O + gl.arange(0, BLOCK_O, gl.SliceLayout(1, layout))
        acc = acc + gl.load(bias_ptr + b, mask=b < num_outputs, other=0.0).to(gl.float32)[:, None]
    store_layout: gl.constexpr = gl.BlockedLayout([8, 1], [8, 4], [1, gl.num_warps()], [0, 1])
    out = gl.convert_layout(acc.to(dtype), store_layout)
    o = tile * BLOCK_O + gl.arange(0, BLOCK_O, gl.SliceLayout(1, store_layout))
    t = gl.arange(0, BLOCK_T, gl.SliceLayout(0, store_layout))
    at = out_ptr + o[:, None] + t[None, :].to(gl.int64) * num_outputs
    gl.store(at, out, mask=(o < num_outputs)[:, None] & (t < num_rows)[None, :])


@gluon.jit
def _multiply(out_ptr, bias_ptr, partials, arrivals, full, empty, w_s, x_s, num_rows, num_outputs,
              num_tiles, chunks, BLOCK_O: gl.constexpr, BLOCK_T: gl.constexpr, STAGES: gl.constexpr,
              IS_SPLIT: gl.constexpr, HAS_BIAS: gl.constexpr):  # fmt: skip
    """The multiplying warps: tiles of this program's part, one after the other."""
    layout: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[gl.num_warps(), 1], instr_shape=[16, BLOCK_T, 16]
    )
    NUM_ELEMENTS: gl.constexpr = BLOCK_O * BLOCK_T
    # partial sums in flight while they are added up: 128 registers of a thread
    AT_ONCE: gl.constexpr = max(1, min(8, 128 * 32 * gl.num_warps() // NUM_ELEMENTS))
    begin = _first_chunk(gl.program_id(0), gl.num_programs(0), num_tiles, chunks, IS_SPLIT)
    end = _first_chunk(gl.program_id(0) + 1, gl.num_programs(0), num_tiles, chunks, IS_SPLIT)
    i = 0
    chunk = begin
    while chunk < end:
        tile = chunk // chunks
        stop = gl.minimum(end, (tile + 1) * chunks)
        is_whole = stop - chunk == chunks
        is_start = chunk == tile * chunks
        acc = gl.zeros([BLOCK_O, BLOCK_T], gl.float32, layout)
        for c in range(chunk, stop):
            s = i % STAGES
            mbarrier.wait(full.index(s), i // STAGES & 1)
            acc = warpgroup_mma(w_s.index(s), x_s.index(s).permute((1, 0)), acc, is_async=True)
            acc = warpgroup_mma_wait(1, deps=(acc,))
            mbarrier.arrive(empty.index((i - 1) % STAGES), count=1, pred=c > chunk)
            i += 1
        acc = warpgroup_mma_wait(0, deps=(acc,))
        mbarrier.arrive(empty.index((i - 1) % STAGES), count=1)
        chunk = stop
        if IS_SPLIT:
            if is_whole:
                _store(acc, out_ptr, bias_ptr, tile, num_rows, num_outputs, HAS_BIAS, layout)
            else:
                o = gl.arange(0, BLOCK_O, gl.SliceLayout(1, layout))
                t = gl.arange(0, BLOCK_T, gl.SliceLayout(0, layout))
                places = o[:, None] * BLOCK_T + t[None, :]
                slot = gl.program_id(0) * 2 + is_start.to(gl.int32)
                gl.store(partials + slot.to(gl.int64) * NUM_ELEMENTS + places, acc)
                wait_for_partition()
                total = num_tiles * chunks
                first = ((tile * chunks + 1) * gl.num_programs(0) - 1) // total
                last = ((tile + 1) * chunks * gl.num_programs(0) - 1) // total
                num_before = gl.atomic_add(arrivals + first, 1, sem="acq_rel")
                if num_before == last - first:
                    acc = gl.zeros([BLOCK_O, BLOCK_T], gl.float32, layout)
                    acc = _add_partials(acc, partials, places, first, last, NUM_ELEMENTS, AT_ONCE)
                    _store(acc, out_ptr, bias_ptr, tile, num_rows, num_outputs, HAS_BIAS, layout)
                    gl.store(arrivals + first, 0)
        else:
            _store(acc, out_ptr, bias_ptr, tile, num_rows, num_outputs, HAS_BIAS, layout)


@gluon.jit(do_not_specialize=["num_rows", "num_tiles", "chunks"])
def multiply_few_rows(w_desc, x_desc, out_ptr, bias_ptr, partials, arrivals, num_rows, num_outputs,
                      num_tiles, chunks, STAGES: gl.constexpr, IS_SPLIT: gl.constexpr,
                      HAS_BIAS: gl.constexpr):  # fmt: skip
    """A part of the product; it sets up the ring and lets the loading warp and the multiplying ones run.

    Args:
        w_desc: Weight in boxes of `[BLOCK_O, BLOCK_I]`.
        x_desc: Rows in boxes of `[BLOCK_T, BLOCK_I]`; all rows are in one.
        out_ptr: `[T, O]`.
        bias_ptr: `[O]`; not read unless HAS_BIAS.
        partials: fp32, two tiles for each program; not used unless IS_SPLIT.
        arrivals: int32 zeros, one for each program; zeros again at the end.
        num_rows: T.
        num_outputs: O.
        num_tiles: Tiles of `BLOCK_O` outputs.
        chunks: Chunks of `BLOCK_I` inputs.
        STAGES: Chunks in the ring.
        IS_SPLIT: Whether a tile's chunks may be shared by programs.
        HAS_BIAS: Whether a bias is added.
    """
    BLOCK_O: gl.constexpr = w_desc.block_type.shape[0]
    BLOCK_T: gl.constexpr = x_desc.block_type.shape[0]
    BLOCK_I: gl.constexpr = w_desc.block_type.shape[1]
    w_s = gl.allocate_shared_memory(w_desc.dtype, [STAGES, BLOCK_O, BLOCK_I], w_desc.layout)
    x_s = gl.allocate_shared_memory(w_desc.dtype, [STAGES, BLOCK_T, BLOCK_I], x_desc.layout)
    full, empty = make_barriers(STAGES, 1), make_barriers(STAGES, 1)
    gl.warp_specialize([
        (_multiply, (out_ptr, bias_ptr, partials, arrivals, full, empty, w_s, x_s, num_rows, num_outputs,
                     num_tiles, chunks, BLOCK_O, BLOCK_T, STAGES, IS_SPLIT, HAS_BIAS)),
        (_load, (w_desc, x_desc, full, empty, w_s, x_s, num_tiles, chunks, IS_SPLIT, STAGES)),
    ], [1], [24])  # fmt: skip
