"""What a name may mean: a folder that is attached to the session, or something on the hub."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
from collections.abc import Iterable
from pathlib import Path

from kd_kit.kaggle_place import kaggle_input

PATIENCE = 15.0
"""Seconds that one question to the hub may take."""


def attached_as(name: str, folders: Iterable[Path]) -> Path | None:
    """The first of ``folders`` whose path below the inputs has the name's parts in a row, or its last part alone.

    Kaggle's slugs have no capitals and no other signs than hyphens, so both sides are compared as slugs.
    """
    wanted = [_slug(part) for part in name.strip("/").split("/")]
    alone = None
    for folder in folders:
        parts = [_slug(part) for part in folder.relative_to(kaggle_input()).parts]
        if any(parts[at : at + len(wanted)] == wanted for at in range(len(parts))):
            return folder
        # of a longer path every part counts: its last one is a version
        if alone is None and len(wanted) <= 2 and wanted[-1] in parts:
            alone = folder
    return alone


def _slug(part: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", part.lower()).strip("-")


def refuse_path(name: str, kind: str) -> None:
    """Raise for what can be no name on the hub."""
    if name.startswith(("/", ".", "~")) or name.count("/") > 1 or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name):
        raise ValueError(
            f"expected a {kind}'s folder, file, hub name or attached path, got {name!r}, which is not here"
        )


def _use_secret() -> None:
    """Sign in to the hub, for gated models, with a Kaggle Secret named HF_TOKEN, if one is attached."""
    from huggingface_hub import get_token

    if get_token() is None and importlib.util.find_spec("kaggle_secrets") is not None:
        from kaggle_secrets import UserSecretsClient

        with contextlib.suppress(Exception):  # no such secret, or none attached: what is public needs none
            os.environ["HF_TOKEN"] = UserSecretsClient().get_secret("HF_TOKEN")


def ask_hub(name: str, kind: str, file: str | None) -> None:
    """Raise if the hub does not give this, unless it was fetched before."""
    from huggingface_hub import HfApi, try_to_load_from_cache

    _use_secret()
    if file is not None and isinstance(try_to_load_from_cache(name, file), str):
        return
    try:
        HfApi().repo_info(name, repo_type=kind, timeout=PATIENCE)
    except Exception as error:  # no internet has many names: of sockets, of TLS, of the client's own offline mode
        reason = " ".join(str(error).split())[:160]
        raise ValueError(
            f"expected {name!r} on the Hugging Face hub or among the inputs, got {type(error).__name__}: {reason}"
        ) from error
