"""What the reader accepts, the `gguf` library reads alike; damage is refused without a hang or a large allocation."""

import os
import random
import resource
import struct
from pathlib import Path
from typing import Any

import gguf
import msgspec
import numpy as np
import pytest

from flashtensors.checkpoint import gguf as gguf_module
from flashtensors.checkpoint.gguf import convert_gguf
from flashtensors.checkpoint.gguf_header import GGUFHeader, read_gguf_header
from flashtensors.errors import CheckpointError, HeaderError, TruncatedFile

from .gguf_files import (
    ARCHITECTURES,
    QUANTIZATION,
    llama_cpp_tensor,
    tiny_metadata,
    tiny_weights,
    write_gguf,
    write_tiny_gguf,
)

SIZES = [0, 1, 2, 3, 7, 8, 9, 31, 32, 33, 64, 255, 2**16, 2**24, 2**31, 2**32 - 1, 2**32, 2**60, 2**63, 2**64 - 1]


@pytest.fixture(autouse=True)
def no_waiting_for_disks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Thousands of conversions need not survive a power cut."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


def assert_agrees_with_the_library(header: GGUFHeader) -> None:
    reader = gguf.GGUFReader(header.path)
    assert {
        tensor.name: (tensor.tensor_type, tensor.shape.tolist()[::-1], tensor.data_offset, tensor.n_bytes)
        for tensor in reader.tensors
    } == {
        tensor.name: (tensor.quantization, list(tensor.shape), tensor.offset, tensor.num_bytes)
        for tensor in header.tensors.values()
    }
    fields = {name: field for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    assert fields.keys() == header.metadata.keys()
    for name, field in fields.items():
        np.testing.assert_equal(header.metadata[name], field.contents() if field.data else [])


def test_every_type_of_value(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "llama")
    values = [("uint8", 255), ("int8", -128), ("uint16", 65535), ("int16", -1), ("uint32", 2**32 - 1), ("int32", -1)]
    values += [("uint64", 2**64 - 1), ("int64", -(2**63)), ("float32", 0.5), ("float64", 0.1), ("bool", True)]
    for kind, value in [*values, ("string", "ünï\0code"), ("array", ["a", ""]), ("array", [1.5]), ("array", [True])]:
        getattr(writer, f"add_{kind}")(f"x.{kind}.{value!r}", value)
    writer.add_custom_alignment(128)
    writer.add_tensor("t", np.zeros((2, 3), np.float32))
    writer.add_tensor("h", np.zeros(3, np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    header = read_gguf_header(tmp_path / "a.gguf")
    assert_agrees_with_the_library(header)
    assert header.metadata["x.uint64.18446744073709551615"] == 2**64 - 1
    assert header.tensors["t"].shape == (2, 3)


def string(text: bytes) -> bytes:
    return struct.pack("<Q", len(text)) + text


def field(key: bytes, kind: int, value: bytes) -> bytes:
    return string(key) + struct.pack("<I", kind) + value


def tensor(name: bytes, shape: list[int], kind: int = 0, offset: int = 0, num_dimensions: int | None = None) -> bytes:
    count = len(shape) if num_dimensions is None else num_dimensions
    return string(name) + struct.pack(f"<I{len(shape)}QIQ", count, *shape, kind, offset)


def pack(
    *,
    fields: list[bytes] | None = None,
    tensors: list[bytes] | None = None,
    data: bytes = bytes(64),
    start: bytes = b"GGUF" + struct.pack("<I", 3),
    counts: tuple[int, int] | None = None,
) -> bytes:
    fields, tensors = fields or [], tensors or []
    num_tensors, num_fields = counts or (len(tensors), len(fields))
    content = start + struct.pack("<QQ", num_tensors, num_fields) + b"".join(fields) + b"".join(tensors)
    return content + bytes(-len(content) % 32) + data


@pytest.mark.parametrize(
    ("content", "error", "says"),
    [
        (b"", TruncatedFile, "0 bytes, but magic ends at byte 4"),
        (b"GGUF", TruncatedFile, "version ends"),
        (pack(start=b"GGML" + struct.pack("<I", 3)), HeaderError, "begins with b'GGML'"),
        (pack(start=b"GGUF" + struct.pack("<I", 1)), HeaderError, "version 1 is not supported"),
        (pack(start=b"GGUF" + struct.pack(">I", 3)), HeaderError, "big-endian"),
        (pack(counts=(2**64 - 1, 0)), TruncatedFile, "claims 18446744073709551615 tensors"),
        (pack(counts=(0, 2**40)), TruncatedFile, "metadata fields"),
        (pack(fields=[struct.pack("<Q", 2**63)]), HeaderError, "a string of 9223372036854775808 bytes"),
        (pack(fields=[field(b"a", 8, struct.pack("<Q", 10**6))]), TruncatedFile, "a ends at byte"),
        (pack(fields=[field(b"a", 8, string(b"\xff"))]), HeaderError, "not UTF-8"),
        (pack(fields=[field(b"a", 4, bytes(4))] * 2), HeaderError, "'a' occurs twice"),
        (pack(fields=[field(b"a", 13, bytes(8))]), HeaderError, "value type 13"),
        (pack(fields=[field(b"a", 7, b"\x02")]), HeaderError, "neither 0 nor 1"),
        (pack(fields=[field(b"a", 9, struct.pack("<IQ", 0, 2**40))]), HeaderError, "1099511627776 items"),
        (pack(fields=[field(b"a", 9, struct.pack("<IQ", 0, 10**6))]), TruncatedFile, "a ends at byte"),
        (pack(fields=[field(b"a", 9, struct.pack("<IQ", 8, 10**6))]), TruncatedFile, "1000000 strings in metadata 'a'"),
        (pack(fields=[field(b"a", 9, struct.pack("<IQ", 9, 1) + bytes(12))]), HeaderError, "value type 9"),
        (pack(fields=[field(b"general.alignment", 4, struct.pack("<I", 0))]), HeaderError, "alignment is 0"),
        (pack(fields=[field(b"general.alignment", 4, struct.pack("<I", 48))]), HeaderError, "alignment is 48"),
        (pack(fields=[field(b"general.alignment", 8, string(b"8"))]), HeaderError, "alignment is '8'"),
        (pack(tensors=[tensor(b"t", [])]), HeaderError, "0 dimensions"),
        (pack(tensors=[tensor(b"t", [1], num_dimensions=2**32 - 1)]), HeaderError, "4294967295 dimensions"),
        (pack(tensors=[tensor(b"t", [2, 0])]), HeaderError, "sizes of at least 1"),
        (pack(tensors=[tensor(b"t", [2**32, 2**32])]), HeaderError, "product below 2^60"),
        (pack(tensors=[tensor(b"t", [17])]), TruncatedFile, "tensor 't' ends at byte"),
        (pack(tensors=[tensor(b"t", [4], offset=64)]), TruncatedFile, "tensor 't' ends at byte"),
        (pack(tensors=[tensor(b"t", [4], offset=16)]), HeaderError, "a multiple of 32"),
        (pack(tensors=[tensor(b"t", [4], kind=4)]), HeaderError, "type 4, which is not known"),
        (pack(tensors=[tensor(b"t", [4], kind=2)]), HeaderError, "rows of 4 elements, expected a multiple of 32"),
        (pack(tensors=[tensor(b"t", [4]), tensor(b"t", [4], offset=32)]), HeaderError, "'t' occurs twice"),
        (pack(tensors=[tensor(b"t", [9]), tensor(b"u", [4], offset=32)]), HeaderError, "'u' overlaps"),
    ],
)
def test_a_damaged_file_is_named_with_what_is_wrong(
    tmp_path: Path, content: bytes, error: type[CheckpointError], says: str
) -> None:
    path = tmp_path / "a.gguf"
    path.write_bytes(content)
    with pytest.raises(error) as caught:
        read_gguf_header(path)
    assert type(caught.value) is error
    assert str(path) in caught.value.message
    assert says in caught.value.message


@pytest.mark.timeout(10)
def test_a_pipe_a_folder_and_nothing_are_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for name in ("pipe", ".", "absent"):
        with pytest.raises(CheckpointError):
            read_gguf_header(tmp_path / name)


def mutate(content: bytes, header_bytes: int, choose: random.Random) -> bytes:
    """Change one or two places of the header: a byte, an integer, a cut, a repetition."""
    changed = bytearray(content)
    for _ in range(choose.choice([1, 1, 2])):
        position = choose.randrange(header_bytes)
        kind = choose.choices(["byte", "u32", "u64", "cut", "repeat", "end"], [12, 2, 2, 1, 1, 1])[0]
        if kind == "byte":
            changed[position] = choose.randrange(256)
        elif kind == "u32":
            changed[position : position + 4] = struct.pack("<I", choose.choice(SIZES) % 2**32)
        elif kind == "u64":
            changed[position : position + 8] = struct.pack("<Q", choose.choice(SIZES))
        elif kind == "cut":
            del changed[position : position + choose.randint(1, 9)]
        elif kind == "repeat":
            changed[position:position] = changed[position : position + choose.randint(1, 24)]
        else:
            return bytes(changed[: choose.randrange(len(changed))])
    return bytes(changed)


@pytest.mark.parametrize("model_type", ["llama", "gemma3_text"])
def test_mutations_are_converted_or_refused(tmp_path: Path, model_type: str) -> None:
    path, _, _ = write_tiny_gguf(tmp_path, model_type, hidden_size=32, intermediate_size=32, head_dim=8)
    content = path.read_bytes()
    header_bytes = min(tensor.offset for tensor in read_gguf_header(path).tensors.values())
    choose = random.Random(7)
    outcomes = {"refused by its header": 0, "refused": 0, "converted": 0}
    memory_kb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(1000):
        path.write_bytes(mutate(content, header_bytes, choose))
        try:
            header = read_gguf_header(path)
        except (HeaderError, TruncatedFile):
            outcomes["refused by its header"] += 1
            continue
        assert_agrees_with_the_library(header)
        outcomes[convert(path, tmp_path / "out")] += 1
    assert min(outcomes.values()) > 30, outcomes
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory_kb < 300_000


def convert(path: Path, folder: Path) -> str:
    """`converted` or `refused`; any other error is a failure."""
    try:
        convert_gguf([path], folder)
    except CheckpointError:
        return "refused"
    return "converted"


ODD_VALUES: list[Any] = [0, 1, 2**32 - 1, 0.0, 1e30, True, "", "text", [0], ["a", "b"], [1.5, 2.5]]


@pytest.mark.parametrize("model_type", ["llama", "gemma3_text"])
def test_metadata_of_another_type_or_range_is_converted_or_refused(tmp_path: Path, model_type: str) -> None:
    config, weights = tiny_weights(tmp_path / "source", model_type, hidden_size=32, intermediate_size=32, head_dim=8)
    tensors = dict(llama_cpp_tensor(name, weight, config) for name, weight in weights.items())
    path = write_gguf(tmp_path / "a.gguf", ARCHITECTURES[model_type], tiny_metadata(config), tensors)
    whole = read_gguf_header(path)
    extra = ["rope.scaling.type", "rope.scaling.factor", "expert_count", "final_logit_softcapping", "rope.scale_linear"]
    keys = [*whole.metadata, *(f"{ARCHITECTURES[model_type]}.{key}" for key in extra), "tokenizer.ggml.add_bos_token"]
    keys += ["split.no", "split.count", "split.tensors.count", "tokenizer.ggml.eot_token_id", "tokenizer.ggml.scores"]
    outcomes = {"refused": 0, "converted": 0}
    for key in keys:
        for value in ODD_VALUES:
            changed = msgspec.structs.replace(whole, metadata={**whole.metadata, key: value})
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(gguf_module, "read_gguf_header", lambda path, changed=changed: changed)
                outcomes[convert(path, tmp_path / "out")] += 1
    assert min(outcomes.values()) > 20, outcomes


def test_a_quantised_tensor_is_measured_in_blocks(tmp_path: Path) -> None:
    values = np.ones((2, 64), np.float32)
    path = write_gguf(tmp_path / "a.gguf", "llama", {}, {"t": values}, quantization=QUANTIZATION.Q8_0)
    header = read_gguf_header(path)
    assert (header.tensors["t"].num_bytes, header.tensors["t"].shape) == (4 * 34, (2, 64))
    assert_agrees_with_the_library(header)
