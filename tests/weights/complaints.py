"""What is expected of an unreadable model: one kind of error, that names the file, in no time."""

from __future__ import annotations

import os
import time
from pathlib import Path

import msgspec
import pytest

from mlxsup.weights import UnreadableModel, Weights, measure


def complaint(
    path: Path | str, *, about: Path | str | None = None, store: Path | None = None, cache: Path | None = None
) -> str:
    """Measure what cannot be measured; return what is said after the name of the file that is at fault."""
    named = str(about or path)
    with pytest.raises(UnreadableModel) as caught:
        measure(path, ollama_store=store, hf_cache=cache)
    error = caught.value
    assert error.message.startswith(f"{named}: "), error.message
    assert error.details["path"] == named
    assert error.permanent
    assert error.details["cause"] in {"bad_weights", "missing_file"}
    assert (error.code, error.source) == ("load_failed", "mlxsup")
    assert isinstance(error.again(), UnreadableModel)
    msgspec.json.encode(error.details)
    return error.message.removeprefix(f"{named}: ")


def measured_in_no_time(path: Path, monkeypatch: pytest.MonkeyPatch, *, at_most: int) -> Weights:
    """Measure a giant: less than 50 ms of work in the best of some tries, and at most so many bytes read."""
    read, pread = 0, os.pread

    def counted(descriptor: int, count: int, offset: int) -> bytes:
        nonlocal read
        read += count
        return pread(descriptor, count, offset)

    with monkeypatch.context() as watched:
        watched.setattr(os, "pread", counted)
        found = measure(path)
    assert read <= at_most
    assert path.stat().st_size > 100 * 10**9

    def work() -> float:
        started = time.thread_time()
        assert measure(path) == found
        return time.thread_time() - started

    assert min(work() for _ in range(5)) < 0.05
    return found


def measured_or_refused(path: Path, store: Path | None = None) -> Weights | UnreadableModel:
    """Measure what may be anything: the answer is a result or the one kind of error, within a second of work."""
    started = time.thread_time()
    try:
        found: Weights | UnreadableModel = measure(path, ollama_store=store)
    except UnreadableModel as error:
        found = error
    assert time.thread_time() - started < 1
    if isinstance(found, Weights):
        assert found.tensor_bytes == sum(file.bytes for file in found.files) == sum(found.dtypes.values())
        assert 0 <= found.tensor_bytes <= 2**63
        msgspec.json.encode(found)
    return found
