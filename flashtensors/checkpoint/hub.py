"""The hub as a source: files stay in the Hugging Face cache and are read there.

Downloads, resumption, tokens, mirrors (`HF_ENDPOINT`) and the place of the cache (`HF_HUB_CACHE`, `HF_HOME`) are
`huggingface_hub`'s, which is imported when it is first needed.
"""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

from ..errors import DiskFull, PullError
from .inventory import DUPLICATE_PATTERNS, MODEL_PATTERNS
from .names import HubReference
from .progress import Reporter


def download_snapshot(
    reference: HubReference, reporter: Reporter, *, token: str | None = None, force: bool = False
) -> Path:
    """Bring the model files of a repository into the Hugging Face cache.

    Args:
        reference: Repository and revision; the default branch when it names none.
        reporter: Told about bytes as they arrive.
        token: For private and gated repositories; None: what `huggingface_hub` finds.
        force: Download what the cache has too: it may be damaged.

    Returns:
        The snapshot's folder; its name is the commit.

    Raises:
        PullError: No such repository or revision, no access, or the link broke; the message says which.
        DiskFull: The cache's file system is full.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HTTPError

    reporter.begin("downloading")
    try:
        folder = snapshot_download(
            reference.repository,
            revision=reference.revision,
            token=token,
            force_download=force,
            allow_patterns=list(MODEL_PATTERNS),
            ignore_patterns=list(DUPLICATE_PATTERNS),
            tqdm_class=_make_bar_class(reporter),
        )
    except (HTTPError, OSError, ValueError, RuntimeError) as error:  # hf_xet raises OSError and RuntimeError
        raise _translate(error, reference) from error
    return Path(folder)


def _translate(error: Exception, reference: HubReference) -> PullError | DiskFull:
    from huggingface_hub import errors

    where = f"{reference.text} on the hub"
    if isinstance(error, errors.GatedRepoError):
        return PullError(
            f"{where} is gated: accept its terms on its page, then give a token of that account "
            "(hf_token, HF_TOKEN or `hf auth login`)"
        )
    if isinstance(error, errors.RepositoryNotFoundError):
        return PullError(
            f"{where} does not exist, or is private: check the spelling, or give a token that may read it "
            "(hf_token, HF_TOKEN or `hf auth login`)"
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return PullError(f"{where}: the repository has no such revision; give a branch, a tag or a commit")
    if isinstance(error, errors.LocalEntryNotFoundError):
        return PullError(
            f"{where} cannot be reached and is not in the Hugging Face cache; check the network, HF_ENDPOINT and "
            f"HF_HUB_OFFLINE, then pull again: {_first_line(error)}"
        )
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return DiskFull(f"{where}: no room left for the Hugging Face cache; free some (`hf cache ls`) and pull again")
    return PullError(f"{where}: the download failed: {_first_line(error)}; pull again, finished files are kept")


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


def _make_bar_class(reporter: Reporter) -> type[Any]:
    """A progress bar that shows nothing and reports the bytes of the one bar that counts all files' bytes."""
    from huggingface_hub.utils import tqdm

    class ByteBar(tqdm):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            self._is_reported = kwargs.get("name") == "huggingface_hub.snapshot_download"
            super().__init__(*args, **{**kwargs, "disable": True})

        def update(self, n: float | None = 1) -> bool | None:
            if self._is_reported:
                self.n += n or 0
                reporter.move_to(int(self.n), int(self.total) if self.total else None)
            return super().update(n)

    return ByteBar
