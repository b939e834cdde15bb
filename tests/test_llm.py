"""`LLM` against transformers, and against itself in every other way of asking."""

import asyncio
import gc
import math
import sys
import threading
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from flashtensors.checkpoint.catalog import Catalog
from flashtensors.checkpoint.pull import pull
from flashtensors.checkpoint.record import ModelRecord
from flashtensors.config import load_settings
from flashtensors.errors import (
    CapacityError,
    CheckpointError,
    ConfigError,
    ContextTooLong,
    RequestError,
    TemplateError,
    WorkerError,
)
from flashtensors.llm import LLM
from flashtensors.request import SamplingParams
from flashtensors.testing.checkpoints import tiny_config, write_tiny_checkpoint, write_tiny_tokenizer
from flashtensors.worker.outputs import OutputBuilder
from flashtensors.worker.prompt_feed import MAX_CHUNK

MODEL_TYPES = ["llama", "mistral", "qwen2", "qwen3", "gemma3_text"]
PROMPTS = ["hello", "the thing and the other thing " * 6, "a", "Is this one? " * 3, "words of all sorts: äöü €"]
GREEDY = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True)
SAMPLED = SamplingParams(temperature=0.9, top_p=0.9, seed=7, max_tokens=24, ignore_eos=True)
BLOCK_BYTES = 2 * 2 * 2 * 16 * 16 * 4
"""Layers × (k, v) × heads × block × head dim × float32, of the tiny Llama."""


def write_model(folder: Path, model_type: str = "llama", **overrides: object) -> Path:
    write_tiny_checkpoint(folder, tiny_config(model_type, **overrides))
    return write_tiny_tokenizer(folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def llm(folder: Path) -> Iterator[LLM]:
    with LLM(folder, device="cpu", max_num_seqs=8) as llm:
        yield llm


def ids(llm: LLM, prompts: list[str], sampling: SamplingParams = GREEDY) -> list[list[int]]:
    return [output.outputs[0].token_ids for output in llm.generate(prompts, sampling)]


def wait_idle(llm: LLM) -> None:
    """Blocks come back within a step; the worker reports when its last work ends."""
    for _ in range(500):
        stats = llm._worker.stats  # pyright: ignore
        if stats and all((m.num_running, m.num_waiting, m.kv_usage) == (0, 0, 0.0) for m in stats.models):
            return
        threading.Event().wait(0.01)
    raise AssertionError("requests still run")


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_greedy_tokens_are_those_of_transformers(tmp_path: Path, model_type: str) -> None:
    folder = write_model(tmp_path / model_type, model_type)
    oracle = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with LLM(folder, device="cpu", max_num_seqs=8) as llm:
        answers = ids(llm, PROMPTS)
        for prompt, answer in zip(PROMPTS, answers, strict=True):
            token_ids = llm.tokenizer.encode(prompt)
            with torch.inference_mode():
                for _ in range(GREEDY.max_tokens or 0):
                    logits = oracle(torch.tensor([token_ids])).logits[0, -1]
                    token_ids.append(int(logits.argmax()))
            assert answer == token_ids[-len(answer) :], prompt


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED])
def test_a_batch_gives_what_each_prompt_gives_alone(llm: LLM, sampling: SamplingParams) -> None:
    assert ids(llm, PROMPTS, sampling) == [ids(llm, [prompt], sampling)[0] for prompt in PROMPTS]


def test_neither_prefix_cache_nor_tight_memory_nor_chunking_changes_tokens(llm: LLM, folder: Path) -> None:
    prompts = [f"{prefix} {text}" for prefix in ("the thing " * 20, "hello") for text in PROMPTS]
    for sampling in (GREEDY, SAMPLED):
        expected = ids(llm, prompts, sampling)
        with LLM(folder, device="cpu", enable_prefix_caching=False, max_tokens_per_step=17) as plain:
            assert ids(plain, prompts, sampling) == expected
        # Room for the longest prompt and little more: ten at once must wait for each other.
        with LLM(folder, device="cpu", kv_cache_size=22 * BLOCK_BYTES, max_num_seqs=10) as tight:
            assert ids(tight, prompts, sampling) == expected


def test_a_prefix_is_found_again(llm: LLM) -> None:
    (first,) = llm.generate("what nobody asked before, " * 8, GREEDY)
    (second,) = llm.generate("what nobody asked before, " * 8, GREEDY)
    assert first.num_cached_tokens == 0
    assert second.num_cached_tokens >= len(second.prompt_token_ids) // 16 * 16 - 16
    assert first.outputs == second.outputs


def test_outputs_keep_the_order_and_the_prompts(llm: LLM) -> None:
    lengths = [9, 1, 5, 20, 3] * 8  # more than fit the window
    params = [SamplingParams(temperature=0.0, max_tokens=count, ignore_eos=True) for count in lengths]
    prompts = [f"number {position}" for position in range(len(lengths))]
    outputs = llm.generate(prompts, params, progress=True)
    assert [output.prompt for output in outputs] == prompts
    assert [len(output.outputs[0].token_ids) for output in outputs] == lengths
    assert all(output.finished for output in outputs)


def test_prompts_may_be_token_ids(llm: LLM) -> None:
    token_ids = llm.tokenizer.encode("hello")
    expected = ids(llm, ["hello"])[0]
    (one,) = llm.generate(token_ids, GREEDY)
    two = llm.generate([token_ids, "hello"], GREEDY)
    assert (one.prompt, one.prompt_token_ids) == (None, token_ids)
    assert [output.outputs[0].token_ids for output in (one, *two)] == [expected] * 3
    assert llm.generate([], GREEDY) == []


def test_several_answers_and_logprobs(llm: LLM) -> None:
    sampling = SamplingParams(n=3, temperature=1.0, seed=3, max_tokens=6, logprobs=2, ignore_eos=True)
    (output,) = llm.generate("hello", sampling)
    assert [answer.index for answer in output.outputs] == [0, 1, 2]
    assert len({tuple(answer.token_ids) for answer in output.outputs}) > 1
    for answer in output.outputs:
        assert answer.logprobs is not None
        assert [len(logprobs.top) for logprobs in answer.logprobs] == [2] * 6
        assert all(math.exp(logprobs.logprob) <= 1 for logprobs in answer.logprobs)


def test_stop_strings_end_the_answer(llm: LLM) -> None:
    (whole,) = llm.generate("hello", GREEDY)
    text = whole.outputs[0].text
    stop = text[len(text) // 2 :][:2]
    sampling = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True, stop=[stop])
    (cut,) = llm.generate("hello", sampling)
    (answer,) = cut.outputs
    assert (answer.text, answer.finish_reason, answer.stop_reason) == (text[: text.index(stop)], "stop", stop)
    assert len(answer.token_ids) < 24
    wait_idle(llm)


def test_stop_tokens_end_the_answer(llm: LLM) -> None:
    token_ids = ids(llm, ["hello"])[0]
    sampling = SamplingParams(temperature=0.0, max_tokens=24, stop_token_ids=[token_ids[5]], ignore_eos=True)
    (answer,) = llm.generate("hello", sampling)[0].outputs
    assert answer.token_ids == token_ids[: token_ids.index(token_ids[5]) + 1]
    assert (answer.finish_reason, answer.stop_reason) == ("stop", token_ids[5])


def test_chat_renders_the_template(llm: LLM) -> None:
    messages = [{"role": "user", "content": "hello"}]
    (output,) = llm.chat(messages, GREEDY)
    assert output.prompt == "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"
    assert output.prompt_token_ids == llm.tokenizer.encode_chat(messages)
    assert [each.outputs for each in llm.chat([messages, messages], GREEDY)] == [output.outputs] * 2


def test_chat_without_a_template_is_refused(folder: Path, tmp_path: Path) -> None:
    bare = write_tiny_checkpoint(tmp_path / "bare", tiny_config("llama"))
    (bare / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
    with LLM(bare, device="cpu") as llm, pytest.raises(TemplateError):
        llm.chat([{"role": "user", "content": "hello"}])


def test_a_stream_grows_to_the_whole_answer(llm: LLM) -> None:
    (whole,) = llm.generate("hello", GREEDY)
    outputs = list(llm.stream("hello", GREEDY))
    lengths = [len(output.outputs[0].token_ids) for output in outputs]
    assert lengths == sorted(set(lengths))  # every output says something new
    assert (lengths[0], lengths[-1]) == (1, 24)
    assert outputs[-1].outputs == whole.outputs
    assert [output.finished for output in outputs] == [False] * (len(outputs) - 1) + [True]


def test_a_stream_that_is_closed_frees_its_blocks(llm: LLM) -> None:
    stream = llm.stream("hello", SamplingParams(max_tokens=400, ignore_eos=True))
    next(stream)
    stream.close()  # pyright: ignore
    wait_idle(llm)


def test_async_generation_gives_the_same(llm: LLM) -> None:
    async def last(prompt: str) -> list[int]:
        token_ids: list[int] = []
        async for output in llm.generate_async(prompt, GREEDY):
            token_ids = output.outputs[0].token_ids
        return token_ids

    async def all_at_once() -> list[list[int]]:
        return await asyncio.gather(*map(last, PROMPTS))

    assert asyncio.run(all_at_once()) == ids(llm, PROMPTS)


@pytest.mark.parametrize("how", ["aclose", "cancel"])
def test_async_generation_that_is_left_frees_its_blocks(llm: LLM, how: str) -> None:
    async def leave() -> None:
        stream = llm.generate_async("hello", SamplingParams(max_tokens=400, ignore_eos=True))
        await anext(stream)
        if how == "aclose":
            await stream.aclose()
            return

        async def read_on() -> None:
            async for _ in stream:
                pass

        task = asyncio.create_task(read_on())
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(leave())
    wait_idle(llm)


def test_threads_share_one_engine(llm: LLM) -> None:
    expected = ids(llm, PROMPTS)
    answers: dict[int, list[list[int]]] = {}
    threads = [
        threading.Thread(target=lambda number=number: answers.update({number: ids(llm, PROMPTS)}))
        for number in range(6)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert answers == dict.fromkeys(range(6), expected)


def test_a_prompt_that_cannot_be_served_ends_the_batch_and_nothing_else(llm: LLM) -> None:
    with pytest.raises(ContextTooLong):
        llm.generate(["hello", [5] * 600], SamplingParams(max_tokens=400, ignore_eos=True))
    with pytest.raises(RequestError, match="at least one"):
        llm.generate([[]], GREEDY)
    with pytest.raises(RequestError, match="knows 0 to 303"):
        llm.generate([[304]], GREEDY)
    with pytest.raises(RequestError, match="1 sampling_params for 2 prompts"):
        llm.generate(["a", "b"], [GREEDY])
    wait_idle(llm)
    assert ids(llm, ["hello"])


BAD_PROMPTS = [
    [["Hello", "world"]],
    [{"prompt": "x"}],
    {"prompt_token_ids": [5]},
    [[[1, 2]]],
    [[None]],
    [None],
    None,
    [[5.9, 9.9]],
    [5.9, 9.9],
    b"\x05\x09",
    [b"\x05\x09"],
    [True],
    [[5, True]],
    [{5, 9}],
]


@pytest.mark.parametrize("prompts", BAD_PROMPTS)
def test_what_is_no_prompt_is_refused_and_ends_nothing_else(llm: LLM, prompts: Any) -> None:
    expected = ids(llm, ["hello"])
    running = llm.stream("hello", GREEDY)
    next(running)
    with pytest.raises(RequestError, match="pass text or a sequence of token ids") as failure:
        llm.generate(prompts, GREEDY)
    assert failure.value.param == "prompt"
    if not isinstance(prompts, list):
        with pytest.raises(RequestError, match="pass text or a sequence of token ids"):
            next(llm.stream(prompts))
    assert list(running)[-1].outputs[0].token_ids == expected[0]
    assert ids(llm, ["hello"]) == expected


@pytest.mark.parametrize("sampling", [5, {"max_tokens": 3}, [{"max_tokens": 3}], "a"])
def test_what_is_no_parameters_is_refused(llm: LLM, sampling: Any) -> None:
    with pytest.raises(RequestError, match=r"pass SamplingParams, such as") as failure:
        llm.generate(["hello"], sampling)
    assert failure.value.param == "sampling_params"
    with pytest.raises(RequestError, match=r"pass SamplingParams, such as"):
        next(llm.stream("hello", sampling))
    assert ids(llm, ["hello"])


def test_token_ids_of_numpy_are_one_prompt(llm: LLM) -> None:
    outputs = llm.generate([np.int64(5), np.int64(9)], GREEDY)  # pyright: ignore[reportArgumentType]
    assert [output.prompt_token_ids for output in outputs] == [[5, 9]]


def test_models_are_found_by_name_in_the_store_and_by_folder(folder: Path, store: Path) -> None:
    record = pull(Catalog(store), str(folder), name="tiny")
    with LLM("tiny", device="cpu", storage_path=str(store)) as named, LLM(record.folder, device="cpu") as found:
        assert named.model == "tiny"
        assert ids(named, ["hello"]) == ids(found, ["hello"])


def test_a_model_that_is_not_there_is_pulled(folder: Path, store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def pull_from_folder(catalog: Catalog, reference: str, **options: object) -> ModelRecord:
        asked.append((reference, options["token"]))
        return pull(catalog, str(folder), name="tiny")

    monkeypatch.setattr("flashtensors.llm.pull", pull_from_folder)
    settings = load_settings({"storage_path": str(store), "hf_token": "secret", "device": "cpu"}, environ={})
    for _ in range(2):
        with LLM("tiny", settings=settings) as llm:
            assert ids(llm, ["hello"])
    assert asked == [("tiny", "secret")], "once"


def test_unknown_keywords_and_bad_values_are_refused(folder: Path) -> None:
    with pytest.raises(ConfigError, match="did you mean 'max_num_seqs'"):
        LLM(folder, max_num_seq=3)
    with pytest.raises(ConfigError, match="gpu_memory_utilization"):
        LLM(folder, gpu_memory_utilization=3.0)
    with pytest.raises(ConfigError, match="trained for at most 512"):
        LLM(folder, device="cpu", max_model_len=513)
    with pytest.raises(ConfigError, match="dtype is 'int3'"):
        LLM(folder, device="cpu", dtype="int3")


def test_a_model_that_does_not_fit_or_is_damaged_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(CapacityError, match="budget is 1000"):
        LLM(folder, device="cpu", mem_pool_size=1000)
    damaged = write_model(tmp_path / "damaged")
    weights = damaged / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    with pytest.raises(CheckpointError):
        LLM(damaged, device="cpu")


def test_settings_reach_the_engine(folder: Path) -> None:
    with LLM(folder, device="cpu", dtype="bfloat16", max_model_len=64, max_num_seqs=2) as llm:
        assert (llm.loaded.dtype, llm.loaded.max_model_len) == ("bfloat16", 64)
        assert llm.loaded.kv_cache_bytes == 2 * 64 // 16 * BLOCK_BYTES // 2


def test_close_fails_what_runs_and_what_comes(folder: Path) -> None:
    llm = LLM(folder, device="cpu")
    stream = llm.stream("hello", SamplingParams(max_tokens=400, ignore_eos=True))
    next(stream)
    llm.close()
    llm.close()
    with pytest.raises(WorkerError):
        list(stream)
    with pytest.raises(WorkerError, match="closed"):
        llm.generate("hello")


def test_an_engine_that_nobody_holds_goes_away(folder: Path) -> None:
    llm = LLM(folder, device="cpu")
    llm.generate("hello")
    thread, gone = llm._worker._thread, weakref.ref(llm)  # pyright: ignore
    del llm
    gc.collect()
    assert gone() is None
    thread.join(20)
    assert not thread.is_alive()


def test_a_failed_step_reaches_every_caller(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from flashtensors.runner.torch_runner import TorchRunner

    with LLM(folder, device="cpu") as llm:
        expected = ids(llm, PROMPTS)
        with monkeypatch.context() as patch:
            patch.setattr(TorchRunner, "launch", lambda self, plan: 1 / 0)
            with pytest.raises(WorkerError, match="ZeroDivisionError"):
                llm.generate(PROMPTS, GREEDY)
        assert ids(llm, PROMPTS) == expected, "the model was dropped with its state, and is loaded again"


def test_prompts_from_a_generator_are_answered_in_order_as_they_are_drawn(llm: LLM) -> None:
    num_drawn = 0

    def prompts() -> Iterator[str]:
        nonlocal num_drawn
        for number in range(600):
            num_drawn += 1
            yield f"number {number}"

    sampling = SamplingParams(temperature=0.0, max_tokens=2, ignore_eos=True)
    answers = llm.generate_each(prompts(), sampling)
    assert num_drawn == 0
    first = next(answers)
    assert num_drawn < 300
    rest = list(answers)
    assert [output.prompt for output in (first, *rest)] == [f"number {number}" for number in range(600)]
    assert [rest[-1].outputs[0].token_ids] == ids(llm, ["number 599"], sampling)


@pytest.mark.slow
def test_a_hundred_thousand_prompts_are_a_window_at_a_time(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    num_prompts, num_seqs, num_drawn = 100_000, 256, 0
    alive: weakref.WeakSet[OutputBuilder] = weakref.WeakSet()
    make = OutputBuilder.__init__

    def note_builder(self: OutputBuilder, *args: object) -> None:
        make(self, *args)  # pyright: ignore
        alive.add(self)

    def prompts() -> Iterator[str]:
        nonlocal num_drawn
        for number in range(num_prompts):
            num_drawn += 1
            yield f"number {number}"

    monkeypatch.setattr(OutputBuilder, "__init__", note_builder)
    monkeypatch.setenv("COLUMNS", "200")
    sampling = (SamplingParams(temperature=0.0, max_tokens=1 + n % 2, ignore_eos=True) for n in range(num_prompts))
    num_held = 8 * num_seqs  # drawn, and not yielded yet
    most_alive = most_at_worker = 0
    num_objects: list[int] = []
    folder = write_model(tmp_path / "tiny", num_hidden_layers=1)
    with LLM(folder, device="cpu", max_num_seqs=num_seqs, kv_cache_size="4MiB") as llm:
        for number, output in enumerate(llm.generate_each(prompts(), sampling, progress=True)):
            assert (output.prompt, len(output.outputs[0].token_ids)) == (f"number {number}", 1 + number % 2)
            assert num_drawn - number <= num_held + 2 * MAX_CHUNK
            if number % 1000 == 500:
                most_alive = max(most_alive, len(alive))
                stats = llm._worker.stats  # pyright: ignore
                assert stats is not None
                most_at_worker = max(most_at_worker, *(each.num_running + each.num_waiting for each in stats.models))
            if number % 10_000 == 9_999:
                num_objects.append(sys.getallocatedblocks())
        assert number + 1 == num_drawn == num_prompts
        wait_idle(llm)
        assert len(alive) == 0
    assert "tiny ━" in (bar := capsys.readouterr().err)
    assert f"{num_prompts}/?" in bar
    # Beside those that are held: a few that wait to be collected as garbage.
    assert 0 < most_alive <= 2 * num_held
    assert 2 * num_seqs < most_at_worker <= 4 * num_seqs
    # One object that each prompt left behind would make 90,000; a window comes and goes.
    assert max(num_objects) - num_objects[0] < 60_000


def test_a_batch_that_is_left_frees_its_blocks(llm: LLM) -> None:
    answers = llm.generate_each(["hello"] * 50, [SamplingParams(max_tokens=5, ignore_eos=True)] * 50)
    next(answers)
    answers.close()  # pyright: ignore
    wait_idle(llm)


def test_quantization_keeps_a_copy_in_the_store_and_finds_it_again(folder: Path, tmp_path: Path) -> None:
    store = str(tmp_path / "store")
    with LLM(folder, quantization="fp8", device="cpu", storage_path=store) as llm:
        assert llm.model == f"{folder.name}:fp8"
        assert llm.loaded.dtype == "float32 (fp8 weights)"
        first = ids(llm, PROMPTS)
    copy = Catalog(Path(store)).get(llm.model)
    again = [copy.name, str(copy.path), *[folder] * 2]
    for model, quantization in zip(again, [None, "fp8", "fp8", "fp8"], strict=True):
        with LLM(model, quantization=quantization, device="cpu", storage_path=store) as llm:
            assert ids(llm, PROMPTS) == first
    assert Catalog(Path(store)).list() == [copy]
    with LLM(folder, device="cpu", storage_path=store) as llm:
        assert llm.loaded.dtype == "float32"
