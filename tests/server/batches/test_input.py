"""Input files of batches: what is refused, and that lines come back as they were, model by model."""

import json
from pathlib import Path

import pytest

from flashtensors.errors import ModelNotFound, StoreError
from flashtensors.server.batches import input as batch_input
from flashtensors.server.batches.input import InputChecker

ENDPOINT = "/v1/completions"


def line(custom_id: object = "a", **changes: object) -> dict[str, object]:
    return {
        "custom_id": custom_id,
        "method": "POST",
        "url": ENDPOINT,
        "body": {"model": "tiny", "prompt": "x"},
    } | changes


def check_model(name: str) -> None:
    if name not in ("tiny", "plain"):
        raise ModelNotFound(f"no model {name}")


def check(folder: Path, *lines: object) -> InputChecker:
    path = folder / "input.jsonl"
    path.write_text("".join(f"{one if isinstance(one, str) else json.dumps(one)}\n" for one in lines))
    checker = InputChecker(ENDPOINT, check_model)
    found = checker.check(path)
    assert (found is None) == bool(checker.errors)
    return checker


@pytest.mark.parametrize(
    ("bad", "code"),
    [
        ("{", "invalid_json_line"),
        ("[1]", "invalid_json_line"),
        ("\ud800".encode("utf-8", "surrogatepass").decode("latin-1"), "invalid_json_line"),
        ({"custom_id": "b"}, "invalid_json_line"),
        (line("b", extra=1), "invalid_json_line"),
        (line(7), "invalid_json_line"),
        (r'{"custom_id": "\ud800", "method": "POST", "url": "/v1/completions", "body": {}}', "invalid_json_line"),
        (line(""), "invalid_custom_id"),
        (line("x" * 513), "invalid_custom_id"),
        (line("a"), "duplicate_custom_id"),
        (line("b", method="GET"), "invalid_method"),
        (line("b", url="/v1/chat/completions"), "invalid_url"),
        (line("b", body={"prompt": "x"}), "missing_model"),
        (line("b", body=[]), "missing_model"),
        (line("b", body={"model": "nonesuch"}), "model_not_found"),
    ],
)
def test_a_bad_line_is_named_by_its_number(tmp_path: Path, bad: object, code: str) -> None:
    checker = check(tmp_path, line("a"), "", bad, line("z"))
    assert [(error.code, error.line) for error in checker.errors] == [(code, 3)]
    assert checker.errors[0].message.startswith("line 3: ")


def test_every_bad_line_is_reported_up_to_a_bound(tmp_path: Path) -> None:
    lines = [line(f"id-{number}", method="PUT") for number in range(150)]
    errors = check(tmp_path, *lines).errors
    assert [error.line for error in errors] == list(range(1, batch_input.MAX_ERRORS + 1))


def test_an_empty_file_is_refused(tmp_path: Path) -> None:
    assert [error.code for error in check(tmp_path, "", " ").errors] == ["empty_file"]


def test_too_many_and_too_long_lines_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch_input, "MAX_LINES", 2)
    assert check(tmp_path, line("a"), line("b")).errors == []
    assert [error.code for error in check(tmp_path, line("a"), line("b"), line("c")).errors] == ["too_many_requests"]
    monkeypatch.setattr(batch_input, "MAX_BODY_BYTES", 200)
    assert [error.code for error in check(tmp_path, line("x" * 300)).errors] == ["line_too_long"]


def test_lines_come_back_model_by_model(tmp_path: Path) -> None:
    path = tmp_path / "input.jsonl"
    lines = [line(f"é{n}", body={"model": ("tiny", "plain")[n % 2], "prompt": "y" * n}) for n in range(7)]
    path.write_text("\n".join(json.dumps(one, ensure_ascii=False) for one in lines))  # the last line without its end
    found = InputChecker(ENDPOINT, check_model).check(path)
    assert found is not None
    assert found.num_lines == 7
    for done in (set(), {"é2", "é5"}, {f"é{n}" for n in range(7)}):
        assert [
            (one.custom_id, json.loads(bytes(one.body))) for piece in found.pieces(done.__contains__) for one in piece
        ] == [(lines[n]["custom_id"], lines[n]["body"]) for n in (0, 2, 4, 6, 1, 3, 5) if f"é{n}" not in done]


def test_lines_come_in_pieces_of_a_bounded_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch_input, "PIECE_LINES", 3)
    monkeypatch.setattr(batch_input, "PIECE_BODY_BYTES", 1000)
    path = tmp_path / "input.jsonl"
    sizes = [1] * 7 + [2000, 600, 600, 1]
    lines = [line(str(n), body={"model": "tiny", "prompt": "y" * size}) for n, size in enumerate(sizes)]
    path.write_text("\n".join(map(json.dumps, lines)))
    found = InputChecker(ENDPOINT, check_model).check(path)
    assert found is not None
    assert [len(piece) for piece in found.pieces(lambda _: False)] == [3, 3, 2, 2, 1]
    path.unlink()
    with pytest.raises(StoreError, match=r"input\.jsonl"):
        next(found.pieces(lambda _: False))


def test_a_line_that_nests_without_end_is_refused(tmp_path: Path) -> None:
    nested = "[" * 100_000 + "]" * 100_000
    text = f'{{"custom_id": "b", "method": "POST", "url": "{ENDPOINT}", "body": {{"model": "tiny", "x": {nested}}}}}'
    assert [error.line for error in check(tmp_path, line("a"), text).errors] == [2]
