"""Runs the bodies of the streaming decode kernel on the CPU: Gluon's names, as torch operations on whole tensors.

Triton's interpreter does not take Gluon. Here layouts mean nothing, shared memory begins as NaN, loads are checked
against the bounds of what they read, and barriers have the phases of the hardware's; a program's two partitions are two
threads that meet at nothing else, so a phase that is wrong ends in a time-out or in keys that are not yet there.
"""

import threading
import types

import torch

TIMEOUT_S = 5.0


class Pointer:
    """An offset, or a tensor of them, into a tensor's memory."""

    def __init__(self, memory: torch.Tensor, offset=0) -> None:
        self.memory, self.offset = memory, offset
        self.dtype = types.SimpleNamespace(element_ty=memory.dtype)

    def __add__(self, offset):
        return Pointer(self.memory, self.offset + offset)


class Shared:
    """A tile of shared memory."""

    def __init__(self, data: torch.Tensor) -> None:
        self.data, self.dtype = data, data.dtype

    def index(self, i):
        return Shared(self.data[int(i)])

    def slice(self, begin, length):
        return Shared(self.data[begin : begin + length])

    def permute(self, order):
        return Shared(self.data.permute(order))

    def load(self, _layout):
        return self.data.clone()


class Barrier:
    """Phases completed, and the bytes that the present one still awaits."""

    def __init__(self) -> None:
        self.changed, self.phases, self.num_bytes = threading.Condition(), 0, 0

    def arrive(self, num_bytes: int = 0) -> None:
        with self.changed:
            self.num_bytes += num_bytes
            self._end_phase()

    def receive(self, num_bytes: int) -> None:
        with self.changed:
            self.num_bytes -= num_bytes
            assert self.num_bytes >= 0, "more bytes than expected"
            self._end_phase()

    def _end_phase(self) -> None:
        if self.num_bytes == 0:
            self.phases += 1
            self.changed.notify_all()

    def wait(self, parity: int) -> None:
        with self.changed:
            assert self.changed.wait_for(lambda: self.phases & 1 != parity, TIMEOUT_S), "a barrier is never passed"


class Barriers:
    def __init__(self, number: int) -> None:
        self.bars = [Barrier() for _ in range(number)]

    def index(self, i):
        return self.bars[int(i)]


class Descriptor:
    """Rows of a cache, in boxes."""

    def __init__(self, rows_ND: torch.Tensor) -> None:
        self.rows_ND = rows_ND


def _copy(descriptor: Descriptor, coordinates, barrier: Barrier, target: Shared) -> None:
    row, count = int(coordinates[0]), len(target.data)
    assert 0 <= row <= len(descriptor.rows_ND) - count
    target.data.copy_(descriptor.rows_ND[row : row + count])
    barrier.receive(target.data.numel() * 2)


def _flat(pointer: Pointer, mask) -> tuple[torch.Tensor, torch.Tensor]:
    at = torch.as_tensor(pointer.offset)
    kept = torch.ones(at.shape, dtype=torch.bool) if mask is None else torch.as_tensor(mask).expand(at.shape)
    assert ((at >= 0) & (at < pointer.memory.numel()))[kept].all(), "out of bounds"
    return at, kept


def _load(pointer, mask=None, other=0, cache_modifier=""):
    at, kept = _flat(pointer, mask)
    values = pointer.memory.flatten()[torch.where(kept, at, 0)]
    return torch.where(kept, values, torch.as_tensor(other, dtype=values.dtype))


def _store(pointer, value, mask=None) -> None:
    at, kept = _flat(pointer, mask)
    value = torch.as_tensor(value).expand(at.shape).to(pointer.memory.dtype)
    pointer.memory.view(-1)[at[kept]] = value[kept]


def _atomic_add(pointer, value, sem):
    before = _load(pointer)
    _store(pointer, before + value)
    return before


def _matmul(a, b, acc):
    return acc + (a.double() @ b.double()).float()


def _over(operation):
    return lambda a, b: operation(torch.as_tensor(a), torch.as_tensor(b))


def _gluon(program: int):
    nothing = lambda *args, **kwargs: None  # noqa: E731
    return types.SimpleNamespace(
        BlockedLayout=nothing, SliceLayout=nothing, DotOperandLayout=nothing, NVMMADistributedLayout=nothing,
        load=_load, store=_store, atomic_add=_atomic_add, static_range=range,
        program_id=lambda axis: torch.tensor(program), arange=lambda begin, end, layout: torch.arange(begin, end),
        full=lambda shape, value, dtype, layout: torch.full(shape, value, dtype=dtype),
        zeros=lambda shape, dtype, layout: torch.zeros(shape, dtype=dtype),
        where=lambda condition, a, b: torch.where(torch.as_tensor(condition), a, b),
        minimum=_over(torch.minimum), maximum=_over(torch.maximum), exp2=torch.exp2, log2=torch.log2, abs=torch.abs,
        max=lambda x, axis: x.amax(axis), sum=lambda x, axis: x.sum(axis), convert_layout=lambda x, layout: x,
        int32=torch.int32, int64=torch.int64, float32=torch.float32,
    )  # fmt: skip


def partition(kernel, program: int, wait=lambda: None):
    """The bodies of the Gluon functions of `kernel`'s module, as functions on the CPU for one program.

    `wait` is called where a body waits for the kernel in front.
    """
    names = dict(vars(kernel)) | {
        "gl": _gluon(program),
        "tl": types.SimpleNamespace(
            extra=types.SimpleNamespace(cuda=types.SimpleNamespace(gdc_wait=wait)), int32=torch.int32
        ),
        "mbarrier": types.SimpleNamespace(
            wait=lambda bar, parity: bar.wait(int(parity)),
            expect=lambda bar, num_bytes, pred: bar.arrive(num_bytes) if pred else None,
            arrive=lambda bar, count: bar.arrive(),
        ),
        "load_tile": _copy, "wait_for_partition": lambda: None,
        "mma_v2": _matmul,
    }  # fmt: skip
    for name, function in vars(kernel).items():
        if hasattr(function, "fn"):
            names[name] = types.FunctionType(function.fn.__code__, names, name)
    return names


def run_program(load, compute) -> None:
    """Run two partitions as threads, and raise what either raised."""
    errors: list[BaseException] = []

    def guarded(body) -> None:
        try:
            body()
        except (AssertionError, IndexError, RuntimeError, TypeError, ValueError, NameError, AttributeError) as error:
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(body,)) for body in (load, compute)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
