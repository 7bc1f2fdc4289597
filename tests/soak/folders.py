"""Where a soak keeps its files: in folders of its own, not in the user's."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def own_folders() -> Iterator[str]:
    """Give this process temporary, state and runtime folders in a new one, whose path it yields."""
    with tempfile.TemporaryDirectory(prefix="soak-") as folder:
        os.environ["TMPDIR"] = tempfile.tempdir = folder
        os.environ["XDG_STATE_HOME"] = os.environ["XDG_RUNTIME_DIR"] = f"{folder}/xdg"
        Path(folder, "xdg").mkdir(mode=0o700)
        yield folder
