"""Compile the split kernel without a GPU; prints what its outer loop carries, before and after optimisation.

Run as a process of its own, without Triton's interpreter: `python compile_split_for_hopper.py HEAD_DIM bf16|fp8`.
Prints also how often it reads shared memory byte by byte, and its shared memory in bytes.
"""

import json
import re
import sys

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from flashtensors.kernels.attention.groups import GROUP_INTS
from flashtensors.kernels.attention.split import attend_split
from flashtensors.kernels.attention.tiles import short_tiles
from flashtensors.kernels.attention.work_queue import RECORD_INTS

ALIGNED = ("q_ptr", "k_ptr", "v_ptr", "out_ptr", *(f"stride_{name}" for name in ("page", "kv_head", "slot")))
"""What launches have at multiples of 16."""


def compile_kernel(head_dim: int, *, has_pairs: bool):
    tiles = short_tiles(16, 8, head_dim, 132, has_pairs=has_pairs)
    constants = {
        "NUM_KV_HEADS": 8, "GROUP": 4, "BLOCK_M": tiles.block_m, "ROWS": 4, "BLOCK_N": tiles.block_n, "PAGE": 64,
        "D": head_dim, "D_PADDED": head_dim, "IS_CAUSAL": True, "HAS_WINDOW": False, "HAS_CAP": False,
        "HAS_SINKS": False, "HAS_TREE": False, "HAS_GROUPS": False, "HAS_SCALES": False, "HAS_LSE": False,
        "MERGE": tiles.merged_rows // 4, "STAGES": tiles.num_stages, "RECORD_INTS": RECORD_INTS,
        "GROUP_INTS": GROUP_INTS, "GROUP_TOKENS": 64, "GROUP_ROWS": 128, "UNIT_HEADS": 2, "HEAD_ROWS": 64,
        "TOKEN_ROWS": 1, "HAS_PAIRS": has_pairs, "HAS_CONVERSION": True, "HAS_EARLY_START": True,
    }  # fmt: skip
    types = {"scale_log2": "fp32", "cap_log2": "fp32", "window": "i32"}
    types |= dict.fromkeys(("q_ptr", "out_ptr"), "*bf16")
    types |= dict.fromkeys(("k_ptr", "v_ptr"), "*i16" if has_pairs else "*bf16")
    sums = ("partial_out", "partial_sums", "group_out", "group_sums")
    types |= dict.fromkeys((*sums, "lse_ptr", "sinks_ptr", "k_scales_ptr", "v_scales_ptr"), "*fp32")
    names = attend_split.arg_names
    types |= {name: "i32" for name in names if name.startswith("stride")}
    source = ASTSource(
        fn=attend_split,
        signature={name: "constexpr" if name in constants else types.get(name, "*i32") for name in names},
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if name in ALIGNED},
    )
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": tiles.num_warps})


def num_carried(ir: str) -> int:
    """Values that the first loop hands from one turn to the next."""
    return len(re.findall(r"scf\.for .*? -> \((.*?)\)", ir)[0].split(","))


if __name__ == "__main__":
    kernel = compile_kernel(int(sys.argv[1]), has_pairs=sys.argv[2] == "fp8")
    found = {stage: num_carried(kernel.asm[stage]) for stage in ("ttir", "ttgir")}
    byte_loads = len(re.findall(r"ld\.shared\.[a-z]8\b", kernel.asm["ptx"]))
    print(json.dumps({**found, "byte_loads": byte_loads, "shared_bytes": kernel.metadata.shared}))
