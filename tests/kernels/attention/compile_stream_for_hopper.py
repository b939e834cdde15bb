"""Compile the streaming decode kernel, and that of its queue, without a GPU; prints its shared memory, spills and the instructions that matter.

Run as a process of its own, without Triton's interpreter: `python compile_stream_for_hopper.py HEAD_DIM ahead|behind groups|alone`.
"""

import json
import re
import subprocess
import sys
import tempfile

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon import language as gl
from triton.experimental.gluon._runtime import GluonASTSource

from flashtensors.kernels.attention.groups import GROUP_INTS
from flashtensors.kernels.attention.hopper_decode import TAIL
from flashtensors.kernels.attention.hopper_decode_kernel import attend_stream
from flashtensors.kernels.attention.stream_queue import GRAIN, TILE_INTS, _cut_shares
from flashtensors.kernels.attention.tiles import stream_tiles

ALIGNED = ("q_ptr", "out_ptr", "partial_out", "partial_sums", "stride_qt", "stride_qh", "stride_ot", "stride_oh")
"""What launches have at multiples of 16."""


def compile_kernel(head_dim: int, *, reads_ahead: bool, has_groups: bool):
    tiles = stream_tiles(head_dim)
    constants = {
        "NUM_KV_HEADS": 8, "GROUP": 4, "ROWS": 4, "PAGE": 64, "BLOCK_N": tiles.block_n, "D": head_dim,
        "SLOTS": tiles.slots, "GRAIN": GRAIN, "TILE_INTS": TILE_INTS, "TAIL": TAIL, "GROUP_INTS": GROUP_INTS,
        "GROUP_TILE": (64, 128, 2, 64, 1) if has_groups else None, "HAS_GROUPS": has_groups, "IS_CAUSAL": True,
        "HAS_WINDOW": False, "HAS_CAP": False, "HAS_TREE": False, "HAS_SINKS": False, "HAS_LSE": False,
        "READS_AHEAD": reads_ahead,
    }  # fmt: skip
    types = {"q_ptr": "*bf16", "out_ptr": "*bf16", "scale_log2": "fp32", "cap_log2": "fp32", "window": "i32"}
    for names, keys in ((("k_desc", "v_desc"), tiles.block_n), (("k_tail_desc", "v_tail_desc"), TAIL)):
        layout = gl.NVMMASharedLayout.get_default_for([keys, head_dim], gl.bfloat16)
        types |= dict.fromkeys(names, f"tensordesc<bf16[{keys}, {head_dim}],{layout!r}>")
    types |= dict.fromkeys(("lse_ptr", "sinks_ptr", "partial_out", "partial_sums", "group_out", "group_sums"), "*fp32")
    types |= {"tree_ptr": "*i64"}
    names = attend_stream.arg_names
    types |= {name: "i32" for name in names if name.startswith("stride")}
    source = GluonASTSource(
        fn=attend_stream,
        signature={name: "constexpr" if name in constants else types.get(name, "*i32") for name in names},
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if name in ALIGNED},
    )
    options = {"num_warps": 4, "maxnreg": tiles.registers}
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)


def compile_queue(*, has_groups: bool):
    constants = {
        "TILE_TOKENS": 4, "NUM_HEADS": 8, "GRAIN": GRAIN, "END_GRAINS": 1, "LEAST_GRAINS": 8, "TILE_INTS": TILE_INTS,
        "IS_CAUSAL": True, "HAS_BEGINS": has_groups, "MAX_SEQS": 64, "BLOCK": 16,
    }  # fmt: skip
    numbers = ("num_seqs", "window", "max_tokens", "num_programs", "least_share")
    names = _cut_shares.arg_names
    signature = {name: "constexpr" if name in constants else "i32" if name in numbers else "*i32" for name in names}
    constexprs = {(names.index(name),): value for name, value in constants.items()}
    source = ASTSource(fn=_cut_shares, signature=signature, constexprs=constexprs)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 1})


def stack_bytes(cubin: bytes) -> int:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = subprocess.run(
            [triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name], capture_output=True, text=True, check=True
        )
    return int(re.findall(r"STACK:(\d+)", usage.stdout)[0])


if __name__ == "__main__":
    compile_queue(has_groups=sys.argv[3] == "groups")
    kernel = compile_kernel(int(sys.argv[1]), reads_ahead=sys.argv[2] == "ahead", has_groups=sys.argv[3] == "groups")
    ptx = kernel.asm["ptx"]
    found = {name: ptx.count(name) for name in ("wgmma.mma_async", "cp.async.bulk.tensor", "griddepcontrol.wait")}
    found |= {"shared_bytes": kernel.metadata.shared, "stack_bytes": stack_bytes(kernel.asm["cubin"])}
    print(json.dumps({**found, "num_warps": kernel.metadata.num_warps}))
