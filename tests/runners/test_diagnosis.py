"""Of all that a runner wrote, the one line that says why it died, and what kind of death that was."""

from __future__ import annotations

import time
from itertools import combinations
from typing import get_args

import pytest

from mlxsup.runners.output import Cause, Diagnosis, clean

from .samples import CHAINED, NOISE, SAMPLES, TRACEBACKS


def diagnosed(text: str) -> Diagnosis:
    diagnosis = Diagnosis()
    for line in text.splitlines():
        diagnosis.read(line)
    return diagnosis


@pytest.mark.parametrize(("cause", "text", "line"), SAMPLES.values(), ids=SAMPLES)
def test_what_programs_really_write(cause: Cause, text: str, line: str) -> None:
    diagnosis = diagnosed(text)
    assert (diagnosis.cause, diagnosis.line) == (cause, line)


@pytest.mark.parametrize(("cause", "text", "line"), SAMPLES.values(), ids=SAMPLES)
@pytest.mark.parametrize("noise", NOISE)
def test_noise_after_it_changes_nothing(cause: Cause, text: str, line: str, noise: str) -> None:
    diagnosis = diagnosed(f"{text}\n{noise}")
    assert (diagnosis.cause, diagnosis.line) == (cause, line)


@pytest.mark.parametrize(("cause", "text", "line"), SAMPLES.values(), ids=SAMPLES)
def test_it_is_logged_as_an_error(cause: Cause, text: str, line: str) -> None:
    diagnosis = Diagnosis()
    errors = [told.strip() for told in text.splitlines() if diagnosis.read(told)]
    assert line in errors


@pytest.mark.parametrize(("text", "line"), TRACEBACKS.values(), ids=TRACEBACKS)
def test_of_a_traceback_the_line_with_the_exception(text: str, line: str) -> None:
    diagnosis = diagnosed(text)
    assert (diagnosis.cause, diagnosis.line) == ("traceback", line)


@pytest.mark.parametrize(("text", "line"), TRACEBACKS.values(), ids=TRACEBACKS)
@pytest.mark.parametrize("noise", NOISE)
def test_noise_after_a_traceback_changes_nothing(text: str, line: str, noise: str) -> None:
    assert diagnosed(f"{text}\n{noise}").line == line


@pytest.mark.parametrize(("cause", "text", "line"), CHAINED.values(), ids=CHAINED)
def test_of_chained_tracebacks_the_last_of_the_gravest(cause: Cause, text: str, line: str) -> None:
    diagnosis = diagnosed(text)
    assert (diagnosis.cause, diagnosis.line) == (cause, line)


def test_all_lines_of_a_traceback_are_logged_as_errors_and_what_follows_is_not() -> None:
    text, _ = TRACEBACKS["plain"]
    diagnosis = Diagnosis()
    assert [diagnosis.read(line) for line in text.splitlines()] == [True] * len(text.splitlines())
    assert not diagnosis.read("serving on port 8080")


@pytest.mark.parametrize("error", ["Worker.<locals>.Broken: no", "module.Class.<lambda>.Oops: no", "KeyboardInterrupt"])
def test_a_traceback_ends_with_any_name_an_exception_can_have(error: str) -> None:
    diagnosis = diagnosed(f'Traceback (most recent call last):\n  File "x.py", line 1, in f\n    f()\n{error}')
    assert diagnosis.line == error
    assert not diagnosis.read("serving on port 8080")


def test_code_in_a_traceback_is_no_error_of_its_own() -> None:
    diagnosis = diagnosed(
        "Traceback (most recent call last):\n"
        '  File "load.py", line 7, in load\n'
        '    raise ValueError("no") from MemoryError("out of memory")\n'
        "ValueError: no"
    )
    assert (diagnosis.cause, diagnosis.line) == ("traceback", "ValueError: no")


@pytest.mark.parametrize(
    "line",
    [
        "error: unexpected argument '--prot' found",
        "Error: no such option: --prot",
        "runner.py: error: the following arguments are required: --model",
        "2026-11-22 13:00:00,123 ERROR root: cannot read the tokenizer",
        "[2026-11-22 13:00:00] [error] cannot read the tokenizer",
        "[ERROR] cannot read the tokenizer",
        "ERROR:    Application startup failed. Exiting.",
        "E1122 fatal: weights are damaged",
        "load failed: weights are damaged",
        "CRITICAL:root:weights are damaged",
    ],
)
def test_lines_that_call_themselves_errors(line: str) -> None:
    diagnosis = Diagnosis()
    assert diagnosis.read(line)
    assert not diagnosis.read("bye")
    assert (diagnosis.cause, diagnosis.line) == ("error", line)


@pytest.mark.parametrize(
    "line",
    [
        "INFO: loaded 291 tensors",
        "Fetching 12 files: 100%|##########| 12/12 [00:00<00:00, 100.0it/s]",
        "listening on 127.0.0.1:8080",
        "memory: 1.2 GiB of 16 GiB in use",
        "opening model.safetensors",
        '127.0.0.1 - - [22/Nov/2026 13:00:00] "GET /health HTTP/1.1" 503 -',
        "",
    ],
)
def test_lines_that_are_no_errors(line: str) -> None:
    diagnosis = Diagnosis()
    assert not diagnosis.read(line)
    assert diagnosis.cause == "unknown"


def test_without_an_error_the_last_line_that_is_not_empty() -> None:
    assert diagnosed("one\n  two  \n\n   \n").line == "two"


def test_nothing_written_is_nothing_told() -> None:
    assert (Diagnosis().line, Diagnosis().cause) == ("", "unknown")


GRAVEST_FIRST: dict[Cause, str] = {
    "out_of_memory": "CUDA out of memory",
    "missing_library": "ImportError: no libmlx.so",
    "missing_file": "no such file or directory: model.gguf",
    "port_in_use": "bind: address already in use",
    "gpu_timeout": "Caused GPU Timeout Error",
    "panic": "fatal error: stack overflow",
    "error": "error: it does not work",
}


@pytest.mark.parametrize(("grave", "slight"), list(combinations(GRAVEST_FIRST, 2)))
def test_the_graver_wins_wherever_it_stands(grave: Cause, slight: Cause) -> None:
    for text in ((grave, slight), (slight, grave)):
        diagnosis = diagnosed("\n".join(GRAVEST_FIRST[cause] for cause in text))
        assert (diagnosis.cause, diagnosis.line) == (grave, GRAVEST_FIRST[grave])


GOES_ON = [
    "CUDA error: out of memory, retrying with a smaller batch",
    "ggml_cuda: out of memory; falling back to the CPU",
    "WARNING: cannot allocate memory for the prompt cache",
    "2026-11-22 13:00:00 [warning] failed to allocate pinned memory",
    "/x/loader.py:7: UserWarning: cannot open shared object file: libnccl.so",
    "ImportError: no module named flash_attn, skipping it",
    "tokenizer_config.json: No such file or directory (ignored)",
    "out of memory: will retry in 2 s",
]
REAL: list[tuple[Cause, str]] = [
    ("traceback", "Traceback (most recent call last):\n  File x\nValueError: unknown architecture: foo"),
    ("error", "error: unknown architecture: foo"),
    ("panic", "GGML_ASSERT(n > 0) failed"),
    ("missing_file", "open: no such file or directory: model.gguf"),
]


@pytest.mark.parametrize("hedged", GOES_ON)
@pytest.mark.parametrize(("cause", "text"), REAL)
def test_an_error_that_the_program_got_over_yields_to_any_other(hedged: str, cause: Cause, text: str) -> None:
    for whole in (f"{hedged}\n{text}", f"{text}\n{hedged}"):
        diagnosis = diagnosed(whole)
        assert (diagnosis.cause, diagnosis.line) == (cause, text.splitlines()[-1])


@pytest.mark.parametrize("hedged", GOES_ON)
def test_alone_it_is_better_than_nothing(hedged: str) -> None:
    assert diagnosed(f"{hedged}\nbye").line == hedged


WORK = "\n".join(f"request {number}: 200" for number in range(20))


@pytest.mark.parametrize("later", ["panic: index out of range", "Traceback (most recent call last):\n  x\nKeyError: 7"])
def test_after_much_work_a_later_error_counts_more_than_an_old_one(later: str) -> None:
    old = "CUDA out of memory"
    assert diagnosed(f"{old}\n{WORK}\n{later}").line == later.splitlines()[-1]
    assert diagnosed(f"{old}\n{later}").line == old


def test_after_much_work_a_line_that_says_little_is_only_an_echo() -> None:
    """A server that prints a table of its memory, then `exiting`."""
    for slight in ("error: exiting", "error: no more, retrying"):
        assert diagnosed(f"CUDA out of memory\n{WORK}\n{slight}").line == "CUDA out of memory"


def test_what_was_left_out_of_a_flood_is_work_too() -> None:
    diagnosis = diagnosed("CUDA out of memory")
    diagnosis.skip(1000)
    diagnosis.read("panic: index out of range")
    assert diagnosis.cause == "panic"


class Service:
    """A runner that had an error; it answers `requests` in so many seconds after it."""

    def __init__(self, error: str = "CUDA out of memory") -> None:
        self.now = 100.0
        self.diagnosis = Diagnosis(lambda: self.now)
        self.read(error)

    def read(self, text: str) -> None:
        for line in text.splitlines():
            self.diagnosis.read(line)

    def work(self, requests: int, seconds: float) -> None:
        for number in range(requests):
            self.now += seconds / requests
            self.diagnosis.read(f'INFO:     127.0.0.1:{number} - "POST /completion HTTP/1.1" 200 OK')

    @property
    def told(self) -> tuple[Cause, str]:
        return self.diagnosis.cause, self.diagnosis.line


def test_an_error_that_was_got_over_long_ago_is_no_cause() -> None:
    service = Service()
    service.work(5000, 3600.0)
    assert service.told == ("unknown", "earlier: CUDA out of memory")


def test_what_was_skipped_makes_an_error_old_too() -> None:
    service = Service()
    service.now += 60.0
    service.diagnosis.skip(1000)
    assert service.told == ("unknown", "earlier: CUDA out of memory")


def test_a_long_dump_just_after_an_error_is_part_of_it() -> None:
    """Go writes all its stacks, then a debugger may hold the process for long."""
    service = Service()
    service.work(5000, 1.0)
    service.now += 3600.0
    assert service.told == ("out_of_memory", "CUDA out of memory")


def test_a_little_work_after_an_error_does_not_make_it_old() -> None:
    service = Service()
    service.work(50, 3600.0)
    assert service.told == ("out_of_memory", "CUDA out of memory")


@pytest.mark.parametrize("later", ["error: exiting", "WARNING: failed to allocate, retrying", "panic: no"])
def test_any_later_error_counts_more_than_an_old_one(later: str) -> None:
    service = Service()
    service.work(5000, 3600.0)
    service.read(later)
    assert service.told[1] == later
    service.read("CUDA out of memory")
    assert service.told == ("out_of_memory", "CUDA out of memory")


@pytest.mark.parametrize(
    "line",
    [
        'INFO:     127.0.0.1:51000 - "GET /health HTTP/1.1" 200 OK',
        "WARNING:root:slow",
        "DEBUG:asyncio: x",
        "ERROR:    not found",
        "info: a request",
    ],
)
def test_a_log_line_of_another_thread_does_not_end_a_traceback(line: str) -> None:
    text, error = TRACEBACKS["plain"]
    *source, last = text.splitlines()
    assert last == error
    diagnosis = diagnosed("\n".join([*source[:2], line, *source[2:], line, last]))
    assert (diagnosis.cause, diagnosis.line) == ("traceback", error)


def test_a_traceback_without_its_last_line_ends_nevertheless() -> None:
    """As when a flood took that line with it: what follows is work, and no error."""
    service = Service('Traceback (most recent call last):\n  File "server.py", line 12, in <module>')
    service.work(20, 1.0)
    assert not service.diagnosis.read("INFO: serving")
    service.read("    indented: it is no source text now\nerror: no weights")
    assert service.told == ("error", "error: no weights")


UNITS = [
    *(
        "failed to open ",
        "failed to open a fil ",
        "assertion ",
        "assertion faile ",
        "port 1 ",
        "port 1111",
        "cannot ",
        "error ",
    ),
    *(
        "address already in ",
        "out of ",
        "panic",
        "terminate ",
        "what(",
        "warn ",
        "E  ",
        "a:",
        "w",
        "wWarning",
        "falling ",
        "retry ",
    ),
    *("\t", " ", "| + ", "| ", "\r", "\x1b[0", "\x1b]", "\x1b[", "[error"),
]


@pytest.mark.parametrize("first", ["", "Traceback (most recent call last):"])
@pytest.mark.parametrize("unit", UNITS)
def test_no_line_takes_more_time_than_its_length_is_worth(unit: str, first: str) -> None:
    """A runner may log prompts. The line is longer than what comes here, so that it shows: a square would be seconds."""
    line = (unit * 300_000)[:300_000]
    diagnosis = diagnosed(first)
    began = time.thread_time()
    diagnosis.read(clean(f"{line} error x".encode()))
    assert time.thread_time() - began < 1.0


def test_of_two_of_a_kind_the_later_wins() -> None:
    assert diagnosed("error: first\nerror: second\nbye").line == "error: second"


def test_every_cause_but_these_is_shown_by_a_sample() -> None:
    assert set(get_args(Cause)) - {cause for cause, _, _ in SAMPLES.values()} == {"traceback", "error", "unknown"}
