"""Dictionaries of tensors there and back: any dtype, any layout, shared elements, devices by prefix."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flashtensors.checkpoint.safetensors import write_safetensors
from flashtensors.errors import CheckpointError, ConfigError, StoreError
from flashtensors.flash import DictStats, load_dict, save_dict

DTYPES = [
    *(torch.bool, torch.uint8, torch.int8, torch.uint16, torch.int16, torch.uint32, torch.int32, torch.uint64),
    *(torch.int64, torch.float16, torch.bfloat16, torch.float32, torch.float64),
    *(torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz, torch.float8_e8m0fnu),
    *(torch.complex32, torch.complex64, torch.complex128),
]


def raw_bytes(tensor: torch.Tensor) -> bytes:
    """Elements in row-major order: comparing bytes holds NaNs and negative zeros to account too."""
    return tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def assert_same(loaded: dict[str, torch.Tensor], saved: dict[str, torch.Tensor]) -> None:
    assert loaded.keys() == saved.keys()
    for name, tensor in saved.items():
        assert (loaded[name].dtype, loaded[name].shape) == (tensor.dtype, tensor.shape), name
        assert raw_bytes(loaded[name]) == raw_bytes(tensor), name


def random_tensor(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    num_bytes = torch.Size(shape).numel() * dtype.itemsize
    random_B = torch.randint(0, 256, (num_bytes,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    return (random_B % 2 if dtype == torch.bool else random_B).view(dtype).reshape(shape)


@pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype(tmp_path: Path, dtype: torch.dtype):
    state = {
        "matrix": random_tensor((3, 5), dtype),
        "zero_dim": random_tensor((), dtype),
        "empty": random_tensor((0, 4), dtype),
        "transposed": random_tensor((4, 6), dtype).t(),
        "strided": random_tensor((9, 2), dtype)[::2],
    }
    save_dict(state, tmp_path)
    assert_same(load_dict(tmp_path), state)


@st.composite
def views_of_one_storage(draw: st.DrawFn) -> dict[str, torch.Tensor]:
    base = random_tensor((draw(st.integers(2, 5)), draw(st.integers(2, 6)), 2), torch.int32, draw(st.integers(0, 99)))
    state = {}
    for name in draw(st.lists(st.text("abc.", min_size=1, max_size=4), unique=True, max_size=6)):
        view = base
        for _ in range(draw(st.integers(0, 3))):
            dim = draw(st.integers(0, view.dim() - 1))
            start = draw(st.integers(0, max(view.shape[dim] - 1, 0)))
            view = draw(
                st.sampled_from(
                    [
                        view,
                        view.transpose(0, view.dim() - 1),
                        view.narrow(dim, start, view.shape[dim] - start),
                        view[::2],
                        view.unsqueeze(dim).expand(*view.shape[:dim], 3, *view.shape[dim:]),
                        view.clone(),
                    ]
                )
            )
        state[name] = view
    return state


@settings(max_examples=80, deadline=None)
@given(views_of_one_storage())
def test_any_views_of_one_storage(state: dict[str, torch.Tensor]):
    with tempfile.TemporaryDirectory() as folder:
        save_dict(state, folder)
        assert_same(load_dict(folder), state)


def test_tied_tensors_are_stored_once_and_share_memory_again(tmp_path: Path):
    weight = torch.randn(64, 64)
    save_dict(
        {"embed": weight, "head": weight, "head_t": weight.t(), "row": weight[3], "other": weight.clone()}, tmp_path
    )
    assert (tmp_path / "model.safetensors").stat().st_size < 2 * weight.nbytes + 8192
    loaded = load_dict(tmp_path)
    loaded["embed"][3, 5] = 42.0
    assert loaded["head"][3, 5] == loaded["head_t"][5, 3] == loaded["row"][5] == 42.0
    assert loaded["head_t"].stride() == (1, 64)
    assert loaded["other"][3, 5] == weight[3, 5]


def test_ties_without_a_contiguous_tensor(tmp_path: Path):
    transposed = torch.randn(3, 4).t()
    save_dict({"a": transposed, "b": transposed}, tmp_path)
    loaded = load_dict(tmp_path)
    assert_same(loaded, {"a": transposed, "b": transposed})
    assert loaded["a"].data_ptr() == loaded["b"].data_ptr()


def test_ties_of_a_dtype_that_the_format_lacks(tmp_path: Path):
    value = torch.randn(3, 4, dtype=torch.complex128)
    save_dict({"a": value, "b": value.t()}, tmp_path)
    loaded = load_dict(tmp_path)
    assert_same(loaded, {"a": value, "b": value.t()})
    assert loaded["a"].data_ptr() == loaded["b"].data_ptr()


def test_conjugates_are_resolved(tmp_path: Path):
    value = torch.randn(5, dtype=torch.complex64)
    save_dict({"value": value, "conj": value.conj(), "imag": value.conj().imag}, tmp_path)
    loaded = load_dict(tmp_path)
    assert torch.equal(loaded["conj"], value.conj().resolve_conj())
    assert torch.equal(loaded["imag"], -value.imag)


def test_a_modules_state(tmp_path: Path):
    module = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.BatchNorm1d(4))
    save_dict(module.state_dict(), tmp_path)
    twin = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.BatchNorm1d(4))
    twin.load_state_dict(load_dict(tmp_path))
    assert_same(dict(twin.state_dict()), dict(module.state_dict()))


def test_parameters_that_require_gradients(tmp_path: Path):
    parameter = torch.nn.Parameter(torch.randn(3))
    save_dict({"p": parameter}, tmp_path)
    assert_same(load_dict(tmp_path), {"p": parameter.detach()})


def test_the_file_is_plain_safetensors(tmp_path: Path):
    state = {"a": torch.randn(3, 2), "b": torch.arange(4)}
    save_dict(state, tmp_path)
    assert_same(safetensors.torch.load_file(tmp_path / "model.safetensors"), state)


def test_files_of_other_writers_and_shards_are_read(tmp_path: Path):
    state = {"a": torch.randn(3, 2), "b": torch.arange(4)}
    for name, tensor in state.items():
        safetensors.torch.save_file({name: tensor}, tmp_path / f"{name}.safetensors")
    assert_same(load_dict(tmp_path), state)


def test_an_empty_dictionary(tmp_path: Path):
    save_dict({}, tmp_path)
    assert load_dict(tmp_path) == {}


def test_saving_again_replaces(tmp_path: Path):
    folder = tmp_path / "new" / "folder"
    save_dict({"a": torch.zeros(3)}, folder)
    before = load_dict(folder)
    save_dict({"b": torch.ones(2)}, folder)
    assert_same(load_dict(folder), {"b": torch.ones(2)})
    assert before["a"].tolist() == [0, 0, 0]
    assert [path.name for path in folder.iterdir()] == ["model.safetensors"]


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (3, "is a int"),
        (torch.eye(3).to_sparse(), "sparse"),
        (torch.empty(3, device="meta"), "without data"),
    ],
)
def test_what_cannot_be_stored_is_named_and_nothing_is_written(tmp_path: Path, value: object, reason: str):
    with pytest.raises(CheckpointError, match=rf"'bad'.*{reason}"):
        save_dict({"good": torch.zeros(2), "bad": value}, tmp_path / "out")  # pyright: ignore[reportArgumentType]
    assert not (tmp_path / "out").exists()


def test_a_name_that_is_no_text(tmp_path: Path):
    with pytest.raises(CheckpointError, match="key 7"):
        save_dict({7: torch.zeros(2)}, tmp_path)  # pyright: ignore[reportArgumentType]


def test_a_folder_that_cannot_be_made(tmp_path: Path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StoreError, match="file"):
        save_dict({"a": torch.zeros(2)}, tmp_path / "file")


def test_the_longest_dotted_prefix_wins(tmp_path: Path):
    state = {
        "layers.1.w": torch.zeros(1),
        "layers.10.w": torch.ones(1),
        "layers.1": torch.ones(2),
        "head": torch.ones(1),
    }
    save_dict(state, tmp_path)
    nowhere = {"layers.1": "cpu", "layers": "cuda:999", "": "cpu"}
    with pytest.raises(ConfigError, match=r"'layers\.10\.w' to 'cuda:999'"):
        load_dict(tmp_path, nowhere)
    assert_same(load_dict(tmp_path, nowhere | {"layers.10": "cpu"}), state)


@pytest.mark.parametrize(
    ("device_map", "message"),
    [
        ({"layers.1": "cpu"}, "not tensor 'layers.10.w'"),
        ({"": "nonsense"}, "no device"),
        ({"": None}, "no device"),
        ({"": "meta"}, "only cpu and cuda"),
        ("cpu", "maps module prefixes"),
    ],
)
def test_a_device_map_that_does_not_fit(tmp_path: Path, device_map: object, message: str):
    save_dict({"layers.10.w": torch.ones(1)}, tmp_path)
    with pytest.raises(ConfigError, match=message):
        load_dict(tmp_path, device_map)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    "extras",
    [
        "not json",
        '{"views": {"b": ["a", [3], [1], 2]}}',
        '{"views": {"b": ["a", [2], [-1], 1]}}',
        '{"views": {"b": ["a", [2], [1, 1], 0]}}',
        '{"views": {"b": ["missing", [1], [1], 0]}}',
        '{"views": {"b": {"base": "a", "shape": [3], "strides": [1], "offset": 2}}}',
        '{"views": {"b": {"base": "a", "shape": [2], "strides": [-1], "offset": 1}}}',
        '{"views": {"b": {"base": "a", "shape": [2], "strides": [1, 1], "offset": 0}}}',
        '{"views": {"b": {"base": "gone", "shape": [1], "strides": [1], "offset": 0}}}',
        '{"views": {"a": {"base": "a", "shape": [1], "strides": [1], "offset": 0}}}',
        '{"raw": {"a": {"dtype": "complex128", "shape": [5]}}}',
        '{"raw": {"a": {"dtype": "load", "shape": [4]}}}',
        '{"raw": {"gone": {"dtype": "complex128", "shape": [1]}}}',
    ],
)
def test_metadata_that_lies_is_refused(tmp_path: Path, extras: str):
    tensors = [("a", "F32", (4,), bytes(16))]
    write_safetensors(tmp_path / "model.safetensors", tensors, {"flashtensors": extras})
    with pytest.raises(CheckpointError):
        load_dict(tmp_path)


@pytest.mark.gpu
def test_there_and_back_on_a_device(tmp_path: Path):
    weight = torch.randn(300, 200, device="cuda")
    state = {"w": weight, "tied": weight.t(), "layers.1": torch.arange(5, device="cuda"), "layers.10": torch.ones(2)}
    save_dict(state, tmp_path)
    assert_same(load_dict(tmp_path), state)
    loaded = load_dict(tmp_path, {"": 0, "layers.1": "cpu"})
    assert_same(loaded, state)
    assert {name: tensor.device.type for name, tensor in loaded.items()} == {
        **dict.fromkeys(("w", "tied", "layers.10"), "cuda"),
        "layers.1": "cpu",
    }
    assert loaded["w"].data_ptr() == loaded["tied"].data_ptr()


def test_what_a_call_took_is_told(tmp_path: Path):
    state = {"a": random_tensor((300, 7), torch.float32), "b": random_tensor((5,), torch.complex128)}
    state["view"] = state["a"][10:20]
    num_bytes = 300 * 7 * 4 + 5 * 16
    saved, loaded = DictStats(), DictStats()
    seen: list[tuple[int, int]] = []
    save_dict(state, tmp_path, progress=lambda *told: seen.append(told), stats=saved)
    assert seen[-1] == (num_bytes, num_bytes)
    assert (saved.num_bytes, set(saved.phase_seconds)) == (num_bytes, {"plan", "write"})
    seen.clear()
    result = load_dict(tmp_path, progress=lambda *told: seen.append(told), stats=loaded)
    assert_same(result, state)
    assert seen[-1] == (num_bytes, num_bytes)
    assert loaded.num_bytes == num_bytes
    assert set(loaded.phase_seconds) == {"plan", "prepare", "read", "restore"}
    assert loaded.readers == ("buffered",)
    assert loaded.gigabytes_per_second > 0


def test_what_an_earlier_call_took_is_not_counted_again(tmp_path: Path):
    save_dict({"a": random_tensor((300, 7), torch.float32)}, tmp_path)
    stats, again = DictStats(), DictStats()
    load_dict(tmp_path, stats=again)
    for _ in range(2):
        again.phase_seconds |= {"read": 1e6, "write": 1e6}
        load_dict(tmp_path, stats=again)
    load_dict(tmp_path, stats=stats)
    assert (again.num_bytes, again.readers) == (stats.num_bytes, stats.readers)
    assert set(again.phase_seconds) == set(stats.phase_seconds)
    assert sum(again.phase_seconds.values()) < 1e6
    save_dict({}, tmp_path, stats=again)
    assert (again.num_bytes, again.readers, set(again.phase_seconds)) == (0, (), {"plan", "write"})


@pytest.mark.parametrize(
    ("numbers", "remedy"),
    [
        ({"num_threads": -1}, "num_threads is -1, but it must be 1 or more, or None"),
        ({"num_threads": 0}, "num_threads is 0"),
        ({"chunk_size": 0}, "chunk_size is 0, but it must be 4096 bytes or more; leave it out for"),
        ({"chunk_size": -5}, "chunk_size is -5"),
    ],
)
def test_numbers_that_nothing_can_be_read_with_are_refused(tmp_path: Path, numbers: dict[str, int], remedy: str):
    save_dict({"a": torch.ones(3)}, tmp_path)
    with pytest.raises(ConfigError, match=remedy):
        load_dict(tmp_path, **numbers)  # pyright: ignore


@pytest.mark.gpu
def test_tensors_go_to_their_devices_and_progress_counts_all(tmp_path: Path):
    state = {f"{module}.weight": random_tensor((999, 33), torch.bfloat16) for module in ("left", "right", "rest")}
    save_dict(state, tmp_path)
    seen: list[tuple[int, int]] = []
    stats = DictStats()
    device_map = {"": "cpu", "left": 0, "right": "cuda:0"}
    result = load_dict(tmp_path, device_map, progress=lambda *told: seen.append(told), stats=stats)
    assert_same(result, state)
    assert {name: tensor.device.type for name, tensor in result.items()} == {
        "left.weight": "cuda",
        "right.weight": "cuda",
        "rest.weight": "cpu",
    }
    assert seen[-1] == (3 * 999 * 33 * 2, 3 * 999 * 33 * 2)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert len(stats.readers) == 2
