"""Binaries lie where they should, and no length or batch needs a new one."""

import os
import subprocess
import sys

import pytest
import torch

from flashtensors.kernels.binaries import folder_for, list_binaries, warm


def test_folders_tell_versions_and_devices_apart(tmp_path):
    folders = {
        folder_for(tmp_path, triton_version=version, capability=capability)
        for version in ("3.6.0", "3.7.0")
        for capability in ((9, 0), (10, 0))
    }
    assert len(folders) == 4
    assert all(folder.parent == tmp_path for folder in folders)


def test_nothing_compiled_is_nothing_listed(tmp_path):
    assert list_binaries(tmp_path / "nowhere") == []


def test_binaries_are_counted(tmp_path):
    kernel = tmp_path / "triton-3.6.0-sm90" / "KEY"
    kernel.mkdir(parents=True)
    (kernel / "a.cubin").write_bytes(b"12345")
    (kernel / "a.json").write_bytes(b"{}")
    (found,) = list_binaries(tmp_path)
    assert (found.name, found.num_kernels, found.num_bytes) == ("triton-3.6.0-sm90", 1, 7)


def test_an_error_of_a_call_is_raised_when_all_have_run(tmp_path):
    ran = []

    def fail():
        raise RuntimeError("no such shape")

    with pytest.raises(RuntimeError, match="no such shape"):
        warm([fail, lambda: ran.append(1)], tmp_path, num_threads=1)
    assert ran == [1]


def test_listing_needs_neither_torch_nor_triton():
    code = (
        "import sys, pathlib; from flashtensors.kernels.binaries import list_binaries;"
        "list_binaries(pathlib.Path('x'));"
        "sys.exit('torch' in sys.modules or 'triton' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], env=os.environ, check=False).returncode == 0


@pytest.mark.gpu
def test_other_lengths_and_batches_compile_nothing_after_warming(tmp_path, monkeypatch):
    triton = pytest.importorskip("triton")
    from flashtensors.kernels.attention.ragged import ragged_attention
    from flashtensors.kernels.attention.work import AttentionWork
    from flashtensors.kernels.binaries import keep_binaries_in
    from flashtensors.kernels.warm_calls import DecoderShape, decoder_calls

    monkeypatch.setattr(triton.knobs.cache, "dir", str(tmp_path))
    folder = keep_binaries_in(tmp_path, torch.cuda.get_device_capability())
    device = torch.device("cuda")
    shape = DecoderShape(
        hidden_size=448, num_heads=14, num_kv_heads=2, head_dim=64, page_size=32, max_seqs=160, max_tokens=4096
    )
    report = warm(decoder_calls(shape, device), folder, num_threads=8)
    assert report.num_compiled == list_binaries(tmp_path)[0].num_kernels > 8
    for num_seqs, new_tokens, length in ((1, 1, 33), (7, 1, 700), (33, 3, 64), (140, 1, 48), (3, 900, 1000)):
        work = AttentionWork(
            num_heads=14, num_kv_heads=2, head_dim=64, max_seqs=160, max_tokens=4096, device=device
        )  # fmt: skip
        pages = -(-length // 32)
        k, v = (torch.randn(num_seqs * pages, 2, 32, 64, device=device, dtype=torch.bfloat16) for _ in range(2))
        tables = torch.arange(num_seqs * pages, device=device, dtype=torch.int32).view(num_seqs, pages)
        starts = torch.arange(num_seqs + 1, device=device, dtype=torch.int32) * new_tokens
        lengths = torch.full((num_seqs,), length, device=device, dtype=torch.int32)
        q = torch.randn(num_seqs * new_tokens, 14, 64, device=device, dtype=torch.bfloat16)
        group = torch.tensor([[0, num_seqs, 32], [0, 0, 0]], device=device, dtype=torch.int32)
        bounds = {"max_query_tokens": 1} if new_tokens == 1 else {}
        for groups in (None, group if length - new_tokens >= 32 else group * 0):
            work.plan(starts, lengths, groups=groups, **bounds)
            ragged_attention(q, k, v, tables, work, scale=0.1)
    torch.cuda.synchronize()
    assert list_binaries(tmp_path)[0].num_kernels == report.num_compiled
