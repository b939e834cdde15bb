"""`flash doctor`: what of this machine and installation would keep a model from running."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import click

from ..config import Settings
from ..server.launch import find_daemon
from .doctor_bytes import check_host_pool, check_kernels, check_reader
from .finding import Finding
from .main import EXIT_ERROR
from .output import print_json, size_text
from .settings_options import settings_of

MIN_FREE_BYTES = 2 * 10**9
"""Below this a pull is likely to fail."""
COMMAND_TIMEOUT_S = 120.0


@click.command("doctor")
@click.option("--deep", is_flag=True, help="Also import torch, in a process of its own, and ask it for the device.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.pass_context
def doctor_command(ctx: click.Context, deep: bool, as_json: bool) -> int:
    """Check this machine and installation; exit code 1 when something would not work."""
    findings = list(check_machine(settings_of(ctx), deep=deep))
    if as_json:
        print_json(findings)
    else:
        width = max(len(finding.check) for finding in findings)
        for finding in findings:
            click.echo(f"{finding.status:<7}  {finding.check.ljust(width)}  {finding.text}")
    return EXIT_ERROR if any(finding.status == "error" for finding in findings) else 0


def check_machine(settings: Settings, *, deep: bool) -> Iterator[Finding]:
    """Every check, cheap ones first."""
    is_new_enough = sys.version_info >= (3, 11)
    yield Finding("python", "ok" if is_new_enough else "error", platform.python_version())
    yield _package("flashtensors")
    yield _package("torch")
    yield _gpu()
    yield _store(settings)
    yield _port(settings)
    yield _hub_cache()
    yield check_reader(settings)
    yield check_host_pool(settings)
    yield check_kernels(settings)
    if deep:
        yield _torch_device()


def _package(name: str) -> Finding:
    try:
        return Finding(name, "ok", importlib.metadata.version(name))
    except importlib.metadata.PackageNotFoundError:
        return Finding(name, "error", f"not installed; pip install {name}")


def _gpu() -> Finding:
    if shutil.which("nvidia-smi") is None:
        return Finding("gpu", "ok", "no nvidia-smi: models run on the CPU")
    query = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    try:
        result = subprocess.run(query, capture_output=True, text=True, timeout=COMMAND_TIMEOUT_S, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        return Finding("gpu", "warning", f"nvidia-smi failed: {error}")
    return Finding("gpu", "ok", "; ".join(result.stdout.split("\n")).strip("; "))


def _store(settings: Settings) -> Finding:
    folder = settings.store
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not os.access(existing, os.W_OK):
        return Finding("store", "error", f"{existing} is not writable; set storage_path")
    free = shutil.disk_usage(existing).free
    status = "ok" if free >= MIN_FREE_BYTES else "warning"
    return Finding("store", status, f"{folder}: {size_text(free)} free")


def _port(settings: Settings) -> Finding:
    info = find_daemon(settings)
    if info is not None:
        return Finding("daemon", "ok", f"runs at {info.url}, pid {info.pid}")
    family = socket.AF_INET6 if ":" in settings.server_host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((settings.server_host, settings.server_port))
        except OSError as error:
            where = f"{settings.server_host} port {settings.server_port}"
            return Finding("daemon", "error", f"none runs, and {where} cannot be used: {error.strerror}")
    return Finding("daemon", "ok", f"none runs; port {settings.server_port} is free")


def _hub_cache() -> Finding:
    from huggingface_hub.constants import HF_HUB_CACHE

    folder = Path(HF_HUB_CACHE)
    return Finding("hub cache", "ok", f"{folder}{'' if folder.is_dir() else ' (not there yet)'}")


def _torch_device() -> Finding:
    program = (
        "import torch; print(torch.__version__, 'cuda', torch.version.cuda, "
        "torch.cuda.get_device_name(0) if torch.cuda.is_available() else 'no CUDA device')"
    )
    try:
        result = subprocess.run(
            [sys.executable, "-c", program], capture_output=True, text=True, timeout=COMMAND_TIMEOUT_S, check=False
        )
    except subprocess.TimeoutExpired:
        return Finding("torch import", "error", f"took longer than {COMMAND_TIMEOUT_S:.0f} s")
    if result.returncode != 0:
        return Finding("torch import", "error", result.stderr.strip().splitlines()[-1])
    return Finding("torch import", "ok", result.stdout.strip())
