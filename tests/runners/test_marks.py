"""Finding what a runner left behind on a system without /proc, which psutil stands for here."""

from __future__ import annotations

import os
import subprocess
import sys

import psutil
import pytest

from mlxsup.runners import marks, procfs

from .children import new_mark


@pytest.mark.parametrize(
    "error", [SystemError("returned a result with an exception set"), OSError(0, "odd"), psutil.AccessDenied(1)]
)
def test_one_process_that_cannot_be_asked_hides_no_other(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    """The extension of psutil for macOS has raised each of these for processes on their way out."""
    usual = psutil.Process.environ

    def environ(process: psutil.Process) -> dict[str, str]:
        if process.pid == os.getpid():
            raise error
        return usual(process)

    monkeypatch.setattr(procfs, "AVAILABLE", False)
    monkeypatch.setattr(psutil.Process, "environ", environ)
    mark = new_mark()
    code = "import os, signal; os.write(1, b'up'); signal.pause()"
    with subprocess.Popen(
        [sys.executable, "-I", "-S", "-c", code], env={marks.MARK: f"{mark}.1"}, stdout=subprocess.PIPE
    ) as child:
        try:
            assert child.stdout is not None
            assert child.stdout.read(2) == b"up"
            assert marks.marked(mark) == [child.pid]
        finally:
            child.kill()
