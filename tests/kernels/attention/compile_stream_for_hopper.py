"""Compile the streaming decode kernel without a GPU; prints its shared memory, spills and the instructions that matter.

Run as a process of its own, without Triton's interpreter: `python compile_stream_for_hopper.py HEAD_DIM ahead|behind`.
"""

import json
import re
import subprocess
import sys
import tempfile

import triton
from triton.backends.compiler import GPUTarget
from triton.experimental.gluon import language as gl
from triton.experimental.gluon._runtime import GluonASTSource

from flashtensors.kernels.attention.hopper_decode import TAIL
from flashtensors.kernels.attention.hopper_decode_kernel import attend_stream
from flashtensors.kernels.attention.stream_queue import GRAIN, TILE_INTS
from flashtensors.kernels.attention.tiles import stream_tiles

ALIGNED = ("q_ptr", "out_ptr", "partial_out", "partial_sums", "stride_qt", "stride_qh", "stride_ot", "stride_oh")
"""What launches have at multiples of 16."""


def compile_kernel(head_dim: int, *, reads_ahead: bool):
    tiles = stream_tiles(head_dim)
    constants = {
        "NUM_KV_HEADS": 8, "GROUP": 4, "ROWS": 4, "PAGE": 64, "BLOCK_N": tiles.block_n, "D": head_dim,
        "SLOTS": tiles.slots, "GRAIN": GRAIN, "TILE_INTS": TILE_INTS, "TAIL": TAIL, "IS_CAUSAL": True,
        "HAS_WINDOW": False, "HAS_CAP": False, "HAS_TREE": False, "HAS_SINKS": False, "HAS_LSE": False,
        "READS_AHEAD": reads_ahead,
    }  # fmt: skip
    types = {"q_ptr": "*bf16", "out_ptr": "*bf16", "scale_log2": "fp32", "cap_log2": "fp32", "window": "i32"}
    for names, keys in ((("k_desc", "v_desc"), tiles.block_n), (("k_tail_desc", "v_tail_desc"), TAIL)):
        layout = gl.NVMMASharedLayout.get_default_for([keys, head_dim], gl.bfloat16)
        types |= dict.fromkeys(names, f"tensordesc<bf16[{keys}, {head_dim}],{layout!r}>")
    types |= dict.fromkeys(("lse_ptr", "sinks_ptr", "partial_out", "partial_sums"), "*fp32")
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


def stack_bytes(cubin: bytes) -> int:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = subprocess.run(
            [triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name], capture_output=True, text=True, check=True
        )
    return int(re.findall(r"STACK:(\d+)", usage.stdout)[0])


if __name__ == "__main__":
    kernel = compile_kernel(int(sys.argv[1]), reads_ahead=sys.argv[2] == "ahead")
    ptx = kernel.asm["ptx"]
    names = ("mma.sync", "ldmatrix", "cp.async.bulk.tensor", "griddepcontrol.wait")
    found = {name: ptx.count(name) for name in names}
    found |= {"shared_bytes": kernel.metadata.shared, "stack_bytes": stack_bytes(kernel.asm["cubin"])}
    print(json.dumps({**found, "num_warps": kernel.metadata.num_warps}))
