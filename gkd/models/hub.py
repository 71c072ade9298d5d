"""transformers and the hub: what they show is hidden, and what they raise becomes one line."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from gkd.errors import ModelError


def is_hub_name(resolved: str) -> bool:
    """Whether a result of `resolve_model` is a name on the hub rather than a folder."""
    return not Path(resolved).is_dir()


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Switches the loading bars of transformers off inside the block."""
    from transformers.utils import logging

    was_enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_enabled:
            logging.enable_progress_bar()


@contextmanager
def explained(path: str, key: str, what: str = "model") -> Iterator[None]:
    """Turns what transformers and the hub raise into a ModelError of one line that starts with `key`."""
    try:
        yield
    except ModelError:
        raise
    except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
        raise ModelError(f"{key}: {_explanation(path, what, error)}") from error


def _explanation(path: str, what: str, error: BaseException) -> str:
    text = str(error)
    causes = _cause_names(error)
    if "trust_remote_code" in text:
        return f"{path} needs program code from its own files, which gkd does not run"
    if is_hub_name(path):
        if "GatedRepoError" in causes:
            return f"{path} is gated: accept its terms at https://huggingface.co/{path}, then `hf auth login`"
        if "RevisionNotFoundError" in causes:
            return f"the hub has no such revision of {path}"
        if "RepositoryNotFoundError" in causes:
            return f"there is no folder {path!r} here, and no model of that name on the hub (or it is private)"
        if causes & {"LocalEntryNotFoundError", "OfflineModeIsEnabled", "ConnectError", "ConnectTimeout"}:
            return f"there is no folder {path!r} here, it is not in the hub's cache, and the hub is out of reach"
    first_line = next((line.strip() for line in text.splitlines() if line.strip()), type(error).__name__)
    return f"cannot load the {what} of {path}: {first_line}"


def _cause_names(error: BaseException | None) -> set[str]:
    names: set[str] = set()
    while error is not None:
        names |= {kind.__name__ for kind in type(error).__mro__}
        error = error.__cause__ or error.__context__
    return names
