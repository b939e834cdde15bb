"""`flash run`: one answer, or a chat."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Generator
from typing import Any

import click

from ..checkpoint.names import parse_reference
from ..config import Settings
from ..errors import InvalidName, ModelNotFound
from ..server.client import DaemonClient
from .output import note, print_json
from .settings_options import settings_of


@click.command("run")
@click.argument("model")
@click.argument("prompt", required=False)
@click.option("--system", metavar="TEXT", help="What the model is told before the conversation.")
@click.option("--temperature", type=float, default=0.0, show_default=True, help="0 always takes the likeliest token.")
@click.option("--max-tokens", type=click.IntRange(min=1), help="Most tokens in an answer.")
@click.option("--seed", type=int, help="The same seed gives the same answer.")
@click.option("--keep-alive", metavar="TIME", help="How long the model stays loaded: 10m, 3600, -1 for ever, 0.")
@click.option("--verbose", is_flag=True, help="Print counts and durations.")
@click.option("--json", "as_json", is_flag=True, help="Print the whole answer as JSON.")
@click.pass_context
def run_command(
    ctx: click.Context,
    model: str,
    prompt: str | None,
    system: str | None,
    temperature: float,
    max_tokens: int | None,
    seed: int | None,
    keep_alive: str | None,
    verbose: bool,
    as_json: bool,
) -> None:
    """Ask MODEL the PROMPT, or chat with it when there is none.

    Without PROMPT, what is piped in is the prompt; on a terminal a chat begins. Starts the daemon when none runs, and
    pulls the model when it is not there.
    """
    if prompt is None and not sys.stdin.isatty():
        prompt = sys.stdin.read()
    if any(text is not None and not _is_text(text) for text in (prompt, system)):
        raise click.UsageError("the prompt is not text in UTF-8")
    if prompt is not None and not prompt.strip():
        raise click.UsageError("the prompt is empty")
    if prompt is None and as_json:
        raise click.UsageError("--json needs a prompt")
    settings = settings_of(ctx)
    options = {"temperature": temperature, "num_predict": max_tokens, "seed": seed}
    body: dict[str, object] = {
        "model": model,
        "options": {name: value for name, value in options.items() if value is not None},
    }
    if keep_alive is not None:
        body["keep_alive"] = keep_alive
    conversation = Conversation(settings, DaemonClient.connect_or_start(settings), body, system)
    if prompt is None:
        conversation.chat(verbose=verbose)
    elif as_json:
        print_json(conversation.whole_answer(prompt))
    else:
        last = conversation.print_answer("/api/generate", conversation.one_prompt(prompt))
        if verbose:
            print_timings(last)


class Conversation:
    """Asks one model through the daemon.

    Args:
        settings: Where the store is, for a pull.
        client: The daemon.
        body: What every request carries.
        system: What the model is told first.
    """

    def __init__(self, settings: Settings, client: DaemonClient, body: dict[str, object], system: str | None) -> None:
        self._settings, self._client, self._body, self._system = settings, client, body, system

    def one_prompt(self, prompt: str) -> dict[str, object]:
        """The fields of a request with one prompt."""
        fields: dict[str, object] = {"prompt": prompt}
        return fields if self._system is None else {**fields, "system": self._system}

    def whole_answer(self, prompt: str) -> dict[str, object]:
        """The answer at once."""
        body = {**self._body, **self.one_prompt(prompt), "stream": False}
        try:
            return self._client.post("/api/generate", body)
        except ModelNotFound as missing:
            self._pull(missing)
            return self._client.post("/api/generate", body)

    def print_answer(self, path: str, fields: dict[str, object], *, can_stop: bool = False) -> dict[str, Any]:
        """Print an answer as it comes; returns the last object, with the text that was printed as `text`.

        Args:
            path: `/api/generate` or `/api/chat`.
            fields: What to send beside what every request carries.
            can_stop: Whether Ctrl-C ends the answer only, and not the command.
        """
        texts: list[str] = []
        last: dict[str, Any] = {}
        with contextlib.closing(self._stream(path, fields)) as lines:
            try:
                for last in lines:
                    texts.append(last["message"]["content"] if "message" in last else last["response"])
                    sys.stdout.write(texts[-1])
                    sys.stdout.flush()
            except KeyboardInterrupt:
                if not can_stop:
                    raise
                note("\nstopped")
            finally:
                if texts:
                    click.echo()
        return {**last, "text": "".join(texts)}

    def chat(self, *, verbose: bool) -> None:
        """Read lines and answer them until /bye or the end of input; Ctrl-C stops an answer."""
        import readline

        readline.set_auto_history(True)  # importing it gives input() line editing

        history: list[dict[str, object]] = []
        has_template = self._prepare()
        if self._system is not None:
            history.append({"role": "system", "content": self._system})
        note("Type /bye or Ctrl-D to leave; Ctrl-C stops an answer.")
        while (line := _read_line()) is not None:
            if not line.strip():
                continue
            if has_template:
                history.append({"role": "user", "content": line})
                last = self.print_answer("/api/chat", {"messages": history}, can_stop=True)
                history.append({"role": "assistant", "content": last["text"]})
            else:
                last = self.print_answer("/api/generate", self.one_prompt(line), can_stop=True)
            if verbose and "total_duration" in last:
                print_timings(last)

    def _prepare(self) -> bool:
        """Pull and load the model; returns whether it has a chat template."""
        try:
            particulars = self._client.post("/api/show", {"model": self._body["model"]})
        except ModelNotFound as missing:
            self._pull(missing)
            particulars = self._client.post("/api/show", {"model": self._body["model"]})
        note(f"loading {self._body['model']} …")
        self._client.post("/api/generate", {"model": self._body["model"], "stream": False})
        return bool(particulars["template"])

    def _stream(self, path: str, fields: dict[str, object]) -> Generator[dict[str, object]]:
        body = {**self._body, **fields}
        try:
            yield from self._client.stream(path, body)
        except ModelNotFound as missing:
            self._pull(missing)
            yield from self._client.stream(path, body)

    def _pull(self, missing: ModelNotFound) -> None:
        """Pull the model; raises `missing` where its name says nothing of a source."""
        from .pull import pull_model

        reference = str(self._body["model"])
        try:
            parse_reference(reference)
        except InvalidName:
            raise missing from None
        pull_model(self._settings, self._client, reference)


def print_timings(last: dict[str, Any]) -> None:
    """Counts and durations of an answer, on standard error."""
    for label, field in (("prompt", "prompt_eval"), ("answer", "eval")):
        count, seconds = last[f"{field}_count"], last[f"{field}_duration"] / 1e9
        rate = f", {count / seconds:.1f} tokens/s" if seconds else ""
        note(f"{label}: {count} tokens in {seconds:.3f} s{rate}")
    note(f"load:   {last['load_duration'] / 1e9:.3f} s")
    note(f"total:  {last['total_duration'] / 1e9:.3f} s")


def _is_text(text: str) -> bool:
    """Whether all bytes of an argument, or of what was piped in, were characters."""
    return not any("\ud800" <= character <= "\udfff" for character in text)


def _read_line() -> str | None:
    try:
        line = input(">>> ")
    except EOFError:
        click.echo()
        return None
    except KeyboardInterrupt:
        click.echo()
        return ""
    return None if line.strip() == "/bye" else line
