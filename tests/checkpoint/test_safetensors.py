"""The reader accepts a part of what the `safetensors` library accepts and agrees with it; the writer is read by it."""

import errno
import io
import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flashtensors.checkpoint import safetensors as module
from flashtensors.checkpoint.safetensors import open_checkpoint, write_safetensors
from flashtensors.checkpoint.safetensors_header import DTYPE_BITS, read_header, read_metadata
from flashtensors.errors import CheckpointError, DiskFull, HeaderError, StoreError, TruncatedFile

quick = settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])


def pack(header: object, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def entry(dtype: str, shape: list[int], begin: int, end: int) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def as_library_reads(content: bytes) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    return {
        name: (tensor["dtype"], tuple(tensor["shape"]), bytes(tensor["data"]))
        for name, tensor in safetensors.deserialize(content)
    }


def as_we_read(path: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    content = path.read_bytes()
    return {
        tensor.name: (tensor.dtype, tensor.shape, content[tensor.offset : tensor.offset + tensor.num_bytes])
        for tensor in read_header(path)
    }


LIBRARY_DTYPES = [
    *(torch.bool, torch.uint8, torch.int8, torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e8m0fnu),
    *(torch.float8_e4m3fnuz, torch.float8_e5m2fnuz, torch.int16, torch.uint16, torch.float16, torch.bfloat16),
    *(torch.int32, torch.uint32, torch.float32, torch.int64, torch.uint64, torch.float64, torch.complex64),
]
shapes = st.lists(st.integers(0, 4), max_size=4)


@quick
@given(tensors=st.dictionaries(st.text(max_size=8), st.tuples(st.sampled_from(LIBRARY_DTYPES), shapes), max_size=6))
def test_every_file_of_the_library_is_read_alike(
    tmp_path: Path, tensors: dict[str, tuple[torch.dtype, list[int]]]
) -> None:
    made = {}
    for name, (dtype, shape) in tensors.items():
        noise = torch.randint(0, 2, (math.prod(shape) * dtype.itemsize,), dtype=torch.uint8)
        made[name] = noise.view(dtype).reshape(shape)
    content = safetensors.torch.save(made, metadata={"format": "pt"})
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    assert as_we_read(path) == as_library_reads(content)
    assert as_we_read(path).keys() == made.keys()
    assert read_metadata(path) == {"format": "pt"}


numbers = st.sampled_from([0, 1, 2, 3, 4, 7, 8, 12, 16, 24, 2**31, 2**32, 2**62, 2**63, 2**64 - 1, 2**64, -1, -8])
odd_values = numbers | st.sampled_from([None, True, 1.0, 0.5, "8", [], {}, [8], "F32", "BF16", "f32", "F4", "F6_E2M3"])


@st.composite
def mutated_files(draw: st.DrawFn) -> bytes:
    """A valid file of two tensors after structural and then bytewise changes, most often one."""
    header: dict[str, Any] = {
        "__metadata__": {"format": "pt"},
        "a": entry("F32", [2, 2], 0, 16),
        "b": entry("U8", [3], 16, 19),
    }
    for _ in range(draw(st.integers(0, 2))):
        target = header[draw(st.sampled_from([name for name in header if isinstance(header[name], dict)]))]
        field = draw(st.sampled_from(["dtype", "shape", "data_offsets", "extra"]))
        if isinstance(target.get(field), list) and draw(st.booleans()):
            position = draw(st.integers(0, len(target[field])))
            target[field] = [*target[field][:position], draw(odd_values), *target[field][position + 1 :]]
        else:
            target[field] = draw(odd_values)
    text = json.dumps(header).encode() + b" " * draw(st.integers(0, 3))
    data = bytes(range(19 + draw(st.sampled_from([0, 0, 0, -1, 1, 5]))))
    content = bytearray(pack(text, data))
    for _ in range(draw(st.integers(0, 2))):
        content[draw(st.integers(0, len(content) - 1))] = draw(
            st.integers(0, 255) | st.sampled_from(b' 019{}[]",:-.e\\')
        )
    return bytes(content[: draw(st.integers(0, len(content)))] if draw(st.integers(0, 9)) == 0 else content)


@settings(quick, max_examples=1500)
@given(content=mutated_files())
def test_what_we_accept_the_library_accepts(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    try:
        ours = as_we_read(path)
    except (HeaderError, TruncatedFile):
        return
    assert ours == as_library_reads(content)


@pytest.mark.parametrize(
    ("content", "error", "says"),
    [
        (b"", TruncatedFile, "0 bytes"),
        (b"\x02\0\0\0\0\0\0\0{", TruncatedFile, "header alone needs 10"),
        ((100_000_001).to_bytes(8, "little") + b"{}", HeaderError, "claims 100000001 bytes"),
        ((2**64 - 1).to_bytes(8, "little") + b"{}", HeaderError, "at most 100000000"),
        (pack(b" {}"), HeaderError, "starts with b' '"),
        (pack(b"{"), HeaderError, "not the JSON"),
        (pack(b'{"\xff": 1}'), HeaderError, "not the JSON"),
        (pack(b'{"\\ud800": {"dtype":"U8","shape":[0],"data_offsets":[0,0]}}'), HeaderError, "not the JSON"),
        (pack(b'{"a":' * 100_000), HeaderError, "not the JSON"),
        (pack(b'{"a":{"dtype":"U8","shape":[' + b"9" * 5000 + b'],"data_offsets":[0,0]}}'), HeaderError, "not a size"),
        (pack(b'{"a":{"dtype":"U8","shape":[-0],"data_offsets":[0,0]}}'), HeaderError, "-0 is not a size"),
        (pack(b'{"a":{"dtype":"U8","shape":[NaN],"data_offsets":[0,0]}}'), HeaderError, "NaN is not a size"),
        (
            pack(b'{"a":{"dtype":"U8","dtype":"U8","shape":[],"data_offsets":[0,1]}}', b"x"),
            HeaderError,
            "'dtype' occurs",
        ),
        (pack({"a": 1}), HeaderError, "tensor 'a' must have exactly"),
        (pack({"__metadata__": {"a": 1}}), HeaderError, "__metadata__"),
        (pack({"a": entry("Q4", [1], 0, 1)}, b"x"), HeaderError, "dtype 'Q4', known are F64"),
        (pack({"a": entry("F32", [True], 0, 4)}, b"1234"), HeaderError, "shape [True]"),
        (pack({"a": entry("U8", [2**40, 2**40], 0, 1)}, b"x"), HeaderError, "below 2^63"),
        (pack({"a": entry("F4", [3], 0, 1)}, b"x"), HeaderError, "whole number of bytes"),
        (
            pack({"a": entry("BF16", [32, 128], 0, 4096)}, b"x"),
            HeaderError,
            "spans 4096 bytes, but BF16 [32, 128] needs",
        ),
        (pack({"a": entry("U8", [2], 0, 2), "b": entry("U8", [2], 1, 3)}, b"xyz"), HeaderError, "'b' overlaps"),
        (pack({"a": entry("U8", [1], 0, 1), "b": entry("U8", [1], 2, 3)}, b"xyz"), HeaderError, "'b' leaves a hole"),
        (pack({"a": entry("U8", [4], 0, 4)}, b"xyz"), TruncatedFile, "tensor 'a' ends at byte"),
        (pack({"a": entry("U8", [2], 0, 2)}, b"xyz"), HeaderError, "the last tensor ends at byte"),
    ],
)
def test_a_damaged_file_is_named_with_what_is_wrong(
    tmp_path: Path, content: bytes, error: type[CheckpointError], says: str
) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(error) as caught:
        read_header(path)
    assert type(caught.value) is error
    assert str(path) in caught.value.message
    assert says in caught.value.message
    assert "pull it again" in caught.value.message


@pytest.mark.timeout(10)
def test_a_pipe_a_folder_and_nothing_are_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for name in ("pipe", ".", "absent"):
        with pytest.raises(CheckpointError):
            read_header(tmp_path / name)


def test_offsets_beyond_32_bits(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    size = 5 * 2**30
    header = pack({"a": entry("U8", [size], 0, size), "b": entry("F32", [1], size, size + 4)})
    with open(path, "wb") as file:
        file.write(header)
        file.truncate(len(header) + size + 4)
    first, second = read_header(path)
    assert (first.offset, first.num_bytes) == (len(header), size)
    assert (second.offset, second.num_bytes) == (len(header) + size, 4)
    with safetensors.safe_open(path, "np") as library:
        assert sorted(library.keys()) == ["a", "b"]


def write_shard(path: Path, *names: str) -> None:
    write_safetensors(path, [(name, "U8", (2,), name.encode()[:1] * 2) for name in names])


def write_index(folder: Path, weight_map: object) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def test_one_file_wins_over_an_index(tmp_path: Path) -> None:
    write_shard(tmp_path / "model.safetensors", "a", "b")
    write_index(tmp_path, {"c": "absent.safetensors"})
    checkpoint = open_checkpoint(tmp_path)
    assert list(checkpoint.tensors) == ["a", "b"]
    assert checkpoint.num_bytes == 4


def test_shards_of_an_index_that_are_links_as_in_the_hubs_cache(tmp_path: Path) -> None:
    snapshot = tmp_path / "snapshots" / "main"
    for folder in (tmp_path / "blobs", snapshot):
        folder.mkdir(parents=True)
    for shard, name in (("one.safetensors", "a"), ("two.safetensors", "b")):
        write_shard(tmp_path / "blobs" / f"blob-{name}", name)
        (snapshot / shard).symlink_to(f"../../blobs/blob-{name}")
    write_index(snapshot, {"a": "one.safetensors", "b": "two.safetensors"})
    (snapshot / "consolidated.safetensors").write_bytes(b"not named by the index")
    checkpoint = open_checkpoint(snapshot)
    assert {name: tensor.path.name for name, tensor in checkpoint.tensors.items()} == {
        "a": "one.safetensors",
        "b": "two.safetensors",
    }


def test_all_files_where_neither_is_there(tmp_path: Path) -> None:
    write_shard(tmp_path / "x.safetensors", "a")
    write_shard(tmp_path / "y.safetensors", "b")
    assert sorted(open_checkpoint(tmp_path).tensors) == ["a", "b"]


@pytest.mark.parametrize(
    ("weight_map", "says"),
    [
        ({"a": "one.safetensors", "b": "three.safetensors"}, "three.safetensors: this shard is missing"),
        ({"a": "../one.safetensors"}, "expected a *.safetensors file beside the index"),
        ({"a": "/etc/passwd"}, "expected a *.safetensors file beside the index"),
        ({"a": "one.bin"}, "expected a *.safetensors file beside the index"),
        ({"a": "one.safetensors", "c": "one.safetensors"}, "tensor 'c' is not there"),
        ({"a": "one.safetensors", "b": "one.safetensors", "d": "two.safetensors"}, "tensor 'b' is not there"),
        (
            {"a": "one.safetensors", "b": "two.safetensors", "x": "copy.safetensors"},
            "'a' is in copy.safetensors and in",
        ),
        (["a"], "not a safetensors index"),
        ({"a": 1}, "not a safetensors index"),
    ],
)
def test_an_index_that_contradicts_its_shards(tmp_path: Path, weight_map: object, says: str) -> None:
    write_shard(tmp_path / "one.safetensors", "a")
    write_shard(tmp_path / "two.safetensors", "b", "d")
    write_shard(tmp_path / "copy.safetensors", "a", "x")
    write_index(tmp_path, weight_map)
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(tmp_path)
    assert says in caught.value.message


def test_a_folder_without_weights(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(CheckpointError, match="only safetensors and GGUF"):
        open_checkpoint(tmp_path)


@quick
@given(tensors=st.dictionaries(st.text(min_size=1, max_size=8), st.tuples(st.sampled_from([*DTYPE_BITS]), shapes)))
def test_the_library_reads_what_we_write(tmp_path: Path, tensors: dict[str, tuple[str, list[int]]]) -> None:
    expected = {}
    for name, (dtype, shape) in tensors.items():
        if DTYPE_BITS[dtype] < 8:
            shape = [*shape, 8]
        expected[name] = (dtype, tuple(shape), os.urandom(DTYPE_BITS[dtype] * math.prod(shape) // 8))
    path = tmp_path / "model.safetensors"
    path.unlink(missing_ok=True)
    write_safetensors(path, [(name, *tensor) for name, tensor in expected.items()], {"format": "pt"})
    assert as_we_read(path) == expected
    content = path.read_bytes()
    library = as_library_reads(content)
    assert {name: (shape, data) for name, (_, shape, data) in library.items()} == {
        name: (shape, data) for name, (_, shape, data) in expected.items()
    }
    assert (8 + int.from_bytes(content[:8], "little")) % 4096 == 0
    for tensor in read_header(path):
        assert tensor.offset % max(1, DTYPE_BITS[tensor.dtype] // 8) == 0


def test_tensors_of_one_dtype_keep_their_order_and_come_in_pieces(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    pieces = [b"ab", bytearray(b"c"), memoryview(b"defg")[:1], b""]
    write_safetensors(path, [("z", "U8", (4,), iter(pieces)), ("f", "F32", (), b"1234"), ("a", "U8", (1,), b"x")])
    assert [tensor.name for tensor in read_header(path)] == ["f", "z", "a"]
    assert path.read_bytes().endswith(b"1234abcdx")


def test_short_writes_are_finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class ShortFile(io.FileIO):
        def write(self, data: Any, /) -> int:
            return super().write(memoryview(data)[:1000])

    monkeypatch.setattr(module, "open", lambda path, mode, buffering: ShortFile(path, "x"), raising=False)
    write_safetensors(tmp_path / "model.safetensors", [("a", "U8", (9999,), bytes(9999))])
    assert read_header(tmp_path / "model.safetensors")[0].num_bytes == 9999


def fail_with(error: BaseException) -> Iterator[bytes]:
    yield b"12"
    raise error


@pytest.mark.parametrize(
    ("data", "raised"),
    [
        (fail_with(OSError(errno.ENOSPC, "No space left on device")), DiskFull),
        (fail_with(OSError(errno.EDQUOT, "Quota exceeded")), DiskFull),
        (fail_with(OSError(errno.EIO, "Input/output error")), StoreError),
        (fail_with(KeyboardInterrupt()), KeyboardInterrupt),
        (b"12345", CheckpointError),
        (b"123", CheckpointError),
    ],
)
def test_a_failed_write_leaves_what_was_there(
    tmp_path: Path, data: bytes | Iterator[bytes], raised: type[BaseException]
) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"as it was")
    with pytest.raises(raised):
        write_safetensors(path, [("a", "F32", (1,), data)])
    assert os.listdir(tmp_path) == ["model.safetensors"]
    assert path.read_bytes() == b"as it was"


@pytest.mark.parametrize(
    "tensors",
    [
        [("a", "U8", (1,), b"x"), ("a", "U8", (1,), b"x")],
        [("__metadata__", "U8", (1,), b"x")],
        [("a", "Q8", (1,), b"x")],
        [("a", "F4", (1,), b"x")],
        [("a", "U8", (2**62, 4), b"x")],
    ],
)
def test_what_the_format_cannot_hold_is_refused(tmp_path: Path, tensors: list[Any]) -> None:
    with pytest.raises(CheckpointError):
        write_safetensors(tmp_path / "model.safetensors", tensors)
    assert os.listdir(tmp_path) == []
