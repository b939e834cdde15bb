"""Result files across crashes at every byte."""

import errno
import json
import os
from pathlib import Path

import pytest

from flashtensors.errors import DiskFull, RequestError, StoreError
from flashtensors.server.batches.results import ResultLog, answered, never_run, refused


def open_log(folder: Path) -> ResultLog:
    return ResultLog(folder / "output", folder / "errors")


def lines_of(path: Path) -> list[dict[str, object]]:
    return [json.loads(text) for text in path.read_text().splitlines()]


def test_results_are_lines_in_openais_shape(tmp_path: Path) -> None:
    with open_log(tmp_path) as log:
        log.append([answered("a", "req_1", {"x": 1}), refused("b", "req_2", RequestError("no", param="n"))])
        log.append([never_run("c", "batch_expired", "too late")])
        assert (log.num_completed, log.num_failed) == (1, 2)
    (answer,), failures = lines_of(tmp_path / "output"), lines_of(tmp_path / "errors")
    assert answer["response"] == {"status_code": 200, "request_id": "req_1", "body": {"x": 1}}
    assert (answer["custom_id"], answer["error"]) == ("a", None)
    assert failures[0]["response"] == {
        "status_code": 400,
        "request_id": "req_2",
        "body": {"error": {"message": "no", "type": "invalid_request_error", "param": "n", "code": "invalid_request"}},
    }
    assert (failures[1]["response"], failures[1]["error"]) == (None, {"code": "batch_expired", "message": "too late"})


@pytest.mark.parametrize("end", ["\n", "\r", "\v", "\f", "\x1c", "\x1d", "\x1e", "\x85", "\u2028", "\u2029"])
def test_a_result_is_one_line_whatever_counts_as_a_line_end(end: str) -> None:
    result = answered(f"a{end}é", "r", {"text": f"one{end}two"})
    (line,) = result.text.decode().splitlines()
    assert json.loads(line)["custom_id"] == f"a{end}é"
    assert json.loads(line)["response"]["body"] == {"text": f"one{end}two"}


def test_a_crash_at_any_byte_loses_at_most_the_torn_line(tmp_path: Path) -> None:
    names = ["one", "zwei", "三"]
    with open_log(tmp_path) as log:
        log.append([answered(name, "r", {"text": name}) for name in names])
    whole = (tmp_path / "output").read_bytes()
    ends = [index + 1 for index, byte in enumerate(whole) if byte == ord("\n")]
    for cut in range(len(whole) + 1):
        (tmp_path / "output").write_bytes(whole[:cut])
        with open_log(tmp_path) as log:
            kept = sum(end <= cut for end in ends)
            assert log.num_completed == kept
            assert [log.has(name) for name in names] == [index < kept for index in range(3)]
            log.append([answered(name, "r", {}) for name in names if not log.has(name)])
        assert [entry["custom_id"] for entry in lines_of(tmp_path / "output")] == names


def test_what_follows_a_broken_line_is_done_again(tmp_path: Path) -> None:
    with open_log(tmp_path) as log:
        log.append([answered("a", "r", {}), answered("b", "r", {})])
    path = tmp_path / "output"
    first, second = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(first + b"\0" * 7 + b"\n" + second)
    with open_log(tmp_path) as log:
        assert (log.has("a"), log.has("b")) == (True, False)


def test_a_disk_that_refuses_is_a_store_error(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="missing"):
        ResultLog(tmp_path / "missing" / "output", tmp_path / "errors")


def test_a_write_that_fails_half_way_leaves_no_torn_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write, num_calls = os.write, 0

    def write_half_and_fail(fd: int, data: bytes) -> int:
        nonlocal num_calls
        num_calls += 1
        if num_calls == 2:
            raise OSError(errno.ENOSPC, "no room")
        return write(fd, data[: len(data) // 2])

    with open_log(tmp_path) as log:
        log.append([answered("a", "r", {})])
        with monkeypatch.context() as patch:
            patch.setattr(os, "write", write_half_and_fail)
            with pytest.raises(DiskFull):
                log.append([answered("b", "r", {})])
        log.append([answered("c", "r", {})])
        assert (log.num_completed, log.has("b")) == (2, False)
    assert [entry["custom_id"] for entry in lines_of(tmp_path / "output")] == ["a", "c"]


def test_tokens_are_counted_once_across_a_crash(tmp_path: Path) -> None:
    usage = {"prompt_tokens": 7, "completion_tokens": 3, "prompt_tokens_details": {"cached_tokens": 2}}
    with open_log(tmp_path) as log:
        log.append([answered("a", "r", {"usage": usage}), refused("b", "r", RequestError("no"))])
        log.append([never_run("c", "batch_expired", "too late")])
        before = log.counts()
    assert before == {
        "num_completed": 1,
        "num_failed": 2,
        "num_input_tokens": 7,
        "num_cached_tokens": 2,
        "num_output_tokens": 3,
    }
    with open_log(tmp_path) as log:
        assert log.counts() == before
        log.append([answered("d", "r", {"usage": usage})])
        assert log.counts()["num_input_tokens"] == 14
