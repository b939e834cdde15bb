"""Compile the kernel of few rows without a GPU; prints its shared memory in bytes and the instructions that matter.

Run as a process of its own, without Triton's interpreter: `python compile_linear_for_hopper.py NUM_ROWS NUM_OUTPUTS`.
"""

import json
import sys

import triton
from triton.backends.compiler import GPUTarget
from triton.experimental.gluon import language as gl
from triton.experimental.gluon._runtime import GluonASTSource

from flashtensors.kernels.linear_hopper import NUM_REGISTERS, NUM_WARPS
from flashtensors.kernels.linear_kernel import multiply_few_rows
from flashtensors.kernels.linear_tiling import choose_tiling


def compile_kernel(num_rows: int, num_outputs: int):
    tiling = choose_tiling(num_rows, 1024, num_outputs, 132)
    constants = {"STAGES": tiling.stages, "IS_SPLIT": tiling.is_split, "HAS_BIAS": True}
    types = {"out_ptr": "*bf16", "bias_ptr": "*bf16", "partials": "*fp32", "arrivals": "*i32"}
    for name, rows in (("w_desc", tiling.block_outputs), ("x_desc", tiling.block_rows)):
        box = [rows, tiling.block_inputs]
        layout = gl.NVMMASharedLayout.get_default_for(box, gl.bfloat16)
        types[name] = f"tensordesc<bf16{box},{layout!r}>"
    names = multiply_few_rows.arg_names
    source = GluonASTSource(
        fn=multiply_few_rows,
        signature={name: "constexpr" if name in constants else types.get(name, "i32") for name in names},
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={},
    )
    options = {"num_warps": NUM_WARPS, "maxnreg": NUM_REGISTERS, "launch_pdl": True}
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)


if __name__ == "__main__":
    kernel = compile_kernel(int(sys.argv[1]), int(sys.argv[2]))
    ptx = kernel.asm["ptx"]
    found = {name: ptx.count(name) for name in ("wgmma.mma_async", "cp.async.bulk.tensor", "griddepcontrol.wait")}
    print(json.dumps({"shared_bytes": kernel.metadata.shared, **found}))
