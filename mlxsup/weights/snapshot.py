"""A Hugging Face cache: `models--ORG--NAME` with `refs` that name snapshots, whose files are links into `blobs`."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Final

from mlxsup.weights.reading import Folder, Path, brief, exists, listing, text_file, unreadable

_NAME = re.compile(r"((?:[A-Za-z0-9][\w.-]*/)?[A-Za-z0-9][\w.-]*)(?:@([\w.-]+))?", re.ASCII)
_VARIABLE = re.compile(r"\$(?:(\w+)|\{([^}]*)\})", re.ASCII)
_DEFAULT_REVISION: Final = "main"
_REF_LIMIT: Final = 1024


def default_cache(environ: Mapping[str, str] = os.environ) -> str:
    """Return where a program with this environment has the cache, by the rules of huggingface_hub.

    That is $HF_HUB_CACHE, $HUGGINGFACE_HUB_CACHE as older programs call it, $HF_HOME/hub, or ~/.cache/huggingface/hub
    ($XDG_CACHE_HOME counts). `~` and variables in these are filled in.
    """
    base = environ.get("XDG_CACHE_HOME") or "~/.cache"
    home = environ.get("HF_HOME") or f"{base}/huggingface"
    return _filled(environ.get("HF_HUB_CACHE") or environ.get("HUGGINGFACE_HUB_CACHE") or f"{home}/hub", environ)


def _filled(path: str, environ: Mapping[str, str]) -> str:
    """Fill in `~` first, then variables, once; what is not set stays as it is written."""
    if path.split("/", 1)[0] == "~" and environ.get("HOME"):
        path = environ["HOME"].rstrip("/") + path[1:]
    path = os.path.expanduser(path)  # noqa: PTH111 - never raises
    return _VARIABLE.sub(lambda match: environ.get(match[1] or match[2], match[0]), path)


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
