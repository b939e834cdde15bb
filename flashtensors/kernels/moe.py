"""A mixture of experts: each row passes through k gated MLPs of its own choice (Shazeer et al., 2017).

    hidden_tj  = silu(gate_e x_t) * (up_e x_t) * w_tj          e = expert_ids[t, j]
    out_t      = sum_j down_e hidden_tj

Weights of experts are stacked: `gate_up` `[X, 2 M, E]` with the rows of gate before those of up, `down` `[X, E, M]`.

Shapes: T rows, E hidden size, M intermediate size, X experts, k experts of a row, P = T k pairs of a row and an expert,
N = 2 M.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import ConfigError
from .activation import silu_mul, silu_mul_reference


def moe(
    x_TE: Tensor,
    gate_up_XNE: Tensor,
    down_XEM: Tensor,
    expert_ids_Tk: Tensor,
    weights_Tk: Tensor,
    *,
    out: Tensor | None = None,
) -> Tensor:
    """`[T, E]`, in the dtype of `x_TE`; the same bits for the same arguments.

    Args:
        x_TE: Last stride 1.
        gate_up_XNE: Contiguous, dtype of `x_TE`.
        down_XEM: As `gate_up_XNE`.
        expert_ids_Tk: int32, from 0 to X - 1 and distinct in a row: as of `route`. Not checked, as they are on the
            device.
        weights_Tk: fp32.
        out: Contiguous; None: a new tensor.

    Raises:
        ConfigError: Shapes, dtypes or strides that do not fit.
    """
    _check(x_TE, gate_up_XNE, down_XEM, expert_ids_Tk, weights_Tk, out)
    if x_TE.is_cuda:
        from .moe_kernel import launch_moe

        return launch_moe(x_TE, gate_up_XNE, down_XEM, expert_ids_Tk, weights_Tk, out=out)
    out = torch.empty_like(x_TE, memory_format=torch.contiguous_format) if out is None else out
    return out.copy_(_grouped_moe(x_TE, gate_up_XNE, down_XEM, expert_ids_Tk, weights_Tk))


def _grouped_moe(
    x_TE: Tensor, gate_up_XNE: Tensor, down_XEM: Tensor, expert_ids_Tk: Tensor, weights_Tk: Tensor
) -> Tensor:
    """Two products for each expert that has rows; sums in fp32, in order of a row's experts."""
    order_P = expert_ids_Tk.flatten().argsort(stable=True)
    x_PE = x_TE.index_select(0, order_P // expert_ids_Tk.shape[1])
    weights_P1 = weights_Tk.flatten().index_select(0, order_P)[:, None]
    updates_PE = x_PE.new_empty(x_PE.shape, dtype=torch.promote_types(x_TE.dtype, torch.float32))
    counts = torch.bincount(expert_ids_Tk.flatten(), minlength=gate_up_XNE.shape[0]).tolist()
    end = 0
    for expert, count in enumerate(counts):
        if count == 0:
            continue
        rows = slice(end, end := end + count)
        hidden = silu_mul(F.linear(x_PE[rows], gate_up_XNE[expert]))
        torch.mul(F.linear(hidden, down_XEM[expert]), weights_P1[rows], out=updates_PE[rows])
    return updates_PE.index_select(0, order_P.argsort()).unflatten(0, expert_ids_Tk.shape).sum(1)


def moe_reference(
    x_TE: Tensor, gate_up_XNE: Tensor, down_XEM: Tensor, expert_ids_Tk: Tensor, weights_Tk: Tensor
) -> Tensor:
    """`moe` by its definition, in the dtype given: every row gathers the weights of its experts."""
    ids_Tk = expert_ids_Tk.long()
    gate_up_TkN = torch.einsum("te,tkne->tkn", x_TE, gate_up_XNE[ids_Tk])
    hidden_TkM = silu_mul_reference(gate_up_TkN) * weights_Tk[..., None].to(x_TE.dtype)
    return torch.einsum("tkm,tkem->te", hidden_TkM, down_XEM[ids_Tk])


def _check(
    x_TE: Tensor,
    gate_up_XNE: Tensor,
    down_XEM: Tensor,
    expert_ids_Tk: Tensor,
    weights_Tk: Tensor,
    out: Tensor | None,
) -> None:
    num_experts, hidden, inner = down_XEM.shape if down_XEM.dim() == 3 else (0, 0, 0)
    num_rows, top_k = expert_ids_Tk.shape if expert_ids_Tk.dim() == 2 else (0, 0)
    wanted = {
        "down": (down_XEM, (num_experts, hidden, inner), x_TE.dtype),
        "gate_up": (gate_up_XNE, (num_experts, 2 * inner, hidden), x_TE.dtype),
        "x": (x_TE, (num_rows, hidden), x_TE.dtype),
        "expert_ids": (expert_ids_Tk, (num_rows, top_k), torch.int32),
        "weights": (weights_Tk, (num_rows, top_k), torch.float32),
        "out": (out, (num_rows, hidden), x_TE.dtype),
    }
    for name, (tensor, shape, dtype) in wanted.items():
        if tensor is None:
            continue
        if tensor.shape != shape or tensor.dtype != dtype or tensor.device != x_TE.device:
            raise ConfigError(
                f"{name} is {tensor.dtype} {list(tensor.shape)} on {tensor.device}, but beside down "
                f"{list(down_XEM.shape)} and expert_ids {list(expert_ids_Tk.shape)} it must be {dtype} "
                f"{list(shape)} on {x_TE.device}"
            )
        if not (tensor.is_contiguous() or (name == "x" and tensor.stride(1) == 1)):
            raise ConfigError(f"{name} has strides {tensor.stride()}, but it must be contiguous")
