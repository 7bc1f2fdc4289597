"""The private folder of one supervisor's sockets: where it is, and that it is there."""

from __future__ import annotations

import os
import stat
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from mlxsup.errors import LoadFailed

FOLDER_PREFIX = "mlxsup-"
SOCKET_PATH_LIMIT = 103
"""macOS gives 104 bytes to the path of a unix socket, the closing NUL included; Linux 108."""
_LONGEST = f"/{FOLDER_PREFIX}12345678/1234567890.sock"


class SocketFolder:
    """A folder that only this user may enter, short enough for the paths of sockets in it."""

    def __init__(self) -> None:
        """Make it.

        Raises:
            LoadFailed: there is no short writable folder for it.
        """
        self.path = _make()

    def restore(self) -> bool:
        """Make it again if it is gone, as folders of temporary files are tidied away; tell whether it is elsewhere now.

        Raises:
            LoadFailed: there is no short writable folder for it.
        """
        if self._is_ours():
            return False
        try:
            self.path.mkdir(mode=0o700)
        except OSError:  # what it was in is gone, or somebody else took its name
            self.path = _make()
            return True
        return False

    def _is_ours(self) -> bool:
        try:
            found = self.path.lstat()
        except OSError:
            return False
        return stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid()


def _make() -> Path:
    reason: object = "their paths are too long"
    for base in _bases():
        if len(os.fsencode(base)) + len(_LONGEST) > SOCKET_PATH_LIMIT:
            continue
        try:
            return Path(tempfile.mkdtemp(prefix=FOLDER_PREFIX, dir=base))
        except OSError as error:
            reason = error
    raise LoadFailed(f"no short writable folder for sockets ({reason}); set TMPDIR to one, such as /tmp")


def _bases() -> Iterator[str]:
    """The folders to make it in, the best first: systemd removes its own with the service, not with the last logout."""
    for given in (os.environ.get("RUNTIME_DIRECTORY", "").partition(":")[0], os.environ.get("XDG_RUNTIME_DIR", "")):
        if os.path.isabs(given):
            yield given
    with suppress(FileNotFoundError):  # no folder for temporary files takes a byte
        yield tempfile.gettempdir()
    yield "/tmp"  # noqa: S108 - mkdtemp makes it private
