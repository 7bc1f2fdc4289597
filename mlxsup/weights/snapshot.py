"""A Hugging Face cache: `models--ORG--NAME` with `refs` that name snapshots, whose files are links into `blobs`."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Final

from mlxsup.weights.reading import Folder, Path, brief, exists, listing, text_file, unreadable

_NAME = re.compile(r"((?:[A-Za-z0-9][\w.-]*/)?[A-Za-z0-9][\w.-]*)(?:@([\w.-]+))?", re.ASCII)
_DEFAULT_REVISION: Final = "main"
_REF_LIMIT: Final = 1024


def default_cache(environ: Mapping[str, str] = os.environ) -> str:
    """Return where the cache is: $HF_HUB_CACHE, $HF_HOME/hub, or ~/.cache/huggingface/hub ($XDG_CACHE_HOME counts)."""
    if environ.get("HF_HUB_CACHE"):
        return os.path.expanduser(environ["HF_HUB_CACHE"])  # noqa: PTH111 - never raises
    base = environ.get("XDG_CACHE_HOME") or "~/.cache"
    home = environ.get("HF_HOME") or f"{base}/huggingface"
    return os.path.expanduser(f"{home}/hub")  # noqa: PTH111


def find(name: str, cache: Path) -> str | None:
    """Return the snapshot of a repository by its name, `ORG/NAME` or `ORG/NAME@REVISION`; None if it is not in the cache.

    Raises:
        UnreadableModel: it is there, but not that revision, or its refs cannot be read.
    """
    match = _NAME.fullmatch(name)
    if not match:
        return None
    repository = f"{os.fspath(cache)}/models--{match[1].replace('/', '--')}"
    return revision_of(repository, match[2] or _DEFAULT_REVISION) if exists(repository) else None


def is_repository(folder: Folder) -> bool:
    """Tell whether a folder is a cached repository itself, rather than one of its snapshots."""
    return "snapshots" in folder.folders and ("blobs" in folder.folders or "refs" in folder.folders)


def revision_of(repository: Path, revision: str = _DEFAULT_REVISION) -> str:
    """Return the folder of one revision in a cached repository.

    Args:
        repository: the folder `models--ORG--NAME`.
        revision: a branch or tag that is in `refs`, or the name of a snapshot. Where `main` is neither, the only snapshot.

    Raises:
        UnreadableModel: that revision is not in the cache, or what `refs` says cannot be read.
    """
    folder = listing(repository)
    snapshots = listing(folder.inside("snapshots")) if "snapshots" in folder.folders else None
    if snapshots is None or not snapshots.folders:
        raise unreadable(repository, "no snapshot in it", missing=True)
    refs = listing(folder.inside("refs")).files if "refs" in folder.folders else ()
    if revision in refs:
        ref = folder.inside("refs", revision)
        found = text_file(ref, limit=_REF_LIMIT).strip()
        if found not in snapshots.folders:
            raise unreadable(ref, f"names the snapshot {brief(found)!r}, which is not there")
        return snapshots.inside(found)
    if revision in snapshots.folders:
        return snapshots.inside(revision)
    if revision == _DEFAULT_REVISION and len(snapshots.folders) == 1:
        return snapshots.inside(snapshots.folders[0])
    known = ", ".join(map(brief, (*refs, *snapshots.folders)[:5]))
    raise unreadable(repository, f"no revision {brief(revision)!r} in the cache; there: {known}", missing=True)
