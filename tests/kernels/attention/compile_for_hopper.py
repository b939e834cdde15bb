"""Compile the Hopper kernel without a GPU; prints its shared memory in bytes and the instructions that matter.

Run as a process of its own, without Triton's interpreter: `python compile_for_hopper.py HEAD_DIM CACHE`, where
the cache is bf16 or fp8e4nv.
"""

import json
import sys

import triton
from triton.backends.compiler import GPUTarget
from triton.experimental.gluon import language as gl
from triton.experimental.gluon._runtime import GluonASTSource

from flashtensors.kernels.attention.hopper import RUN_BYTES, TILES
from flashtensors.kernels.attention.hopper_kernel import attend_tiles


def compile_kernel(head_dim: int, cache: str):
    block_n, stages = TILES[head_dim]
    constants = {
        "NUM_HEADS": 16, "GROUP": 4, "NUM_KV_HEADS": 8, "PAIR": True, "PAGE": 64, "BLOCK_N": block_n, "D": head_dim,
        "STAGES": stages, "IS_CAUSAL": True, "HAS_WINDOW": False, "HAS_CAP": False, "HAS_LSE": True,
        "HAS_SINKS": False, "HAS_SCALES": cache != "bf16", "RUN_BYTES": RUN_BYTES,
    }  # fmt: skip
    element = {"bf16": gl.bfloat16, "fp8e4nv": gl.float8e4nv}[cache]
    q_layout = gl.NVMMASharedLayout.get_default_for([64, head_dim], gl.bfloat16)
    kv_layout = gl.NVMMASharedLayout.get_default_for([64, head_dim], element)
    types = {"out_ptr": "*bf16", "scale_log2": "fp32", "cap_log2": "fp32", "window": "i32"}
    types["q_desc"] = f"tensordesc<bf16[64, {head_dim}],{q_layout!r}>"
    types |= dict.fromkeys(("k_desc", "v_desc"), f"tensordesc<{cache}[64, {head_dim}],{kv_layout!r}>")
    types |= dict.fromkeys(
        ("lse_ptr", "sinks_ptr", "k_scales_ptr", "v_scales_ptr", "partial_out", "partial_sums"), "*fp32"
    )
    types |= dict.fromkeys(("stride_table", "stride_ot"), "i32")
    names = attend_tiles.arg_names
    source = GluonASTSource(
        fn=attend_tiles,
        signature={name: "constexpr" if name in constants else types.get(name, "*i32") for name in names},
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={},
    )
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4})


if __name__ == "__main__":
    kernel = compile_kernel(int(sys.argv[1]), sys.argv[2])
    ptx = kernel.asm["ptx"]
    found = {name: ptx.count(name) for name in ("wgmma.mma_async", "cp.async.bulk.tensor", "setmaxnreg")}
    print(json.dumps({"shared_bytes": kernel.metadata.shared, **found}))
