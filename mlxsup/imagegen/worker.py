"""The one thread in which MLX lives: it loads the pipeline and then makes one picture after the other.

The event loop talks to it through `Worker.submit` and the `Job` that comes back; the thread talks back by callbacks
that the job schedules on the loop. Arrays never leave the thread.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from mlxsup.errors import Loading, QueueFull
from mlxsup.imagegen.encoding import Output, encode
from mlxsup.imagegen.pipelines.base import Loader, Order, Pipeline, Preview
from mlxsup.imagegen.previews import preview_size, preview_steps
from mlxsup.metadata import Settings
from mlxsup.protocol import CompletionChunk, RunnerMemory

QUEUE = 8
"""Orders that may wait behind the one in work."""

CACHE_LIMIT = 32 << 20
"""Bytes of freed buffers that MLX may keep for reuse."""

GIVEN_UP = "given up: nobody waits for this picture any more"

logger = logging.getLogger(__name__)


class _GivenUpError(Exception):
    """Nobody wants this picture any more."""


@dataclass(eq=False)
class Job:
    """One order and where its chunks go.

    Attributes:
        order: what to make.
        output: in what form.
        settings: what the picture file is to say of how it was made.
        deliver: called in the worker's thread with each chunk; the last one has `done`.
        given_up: set by the loop's side; looked at between two steps.
    """

    order: Order
    output: Output
    settings: Settings | None
    deliver: Callable[[CompletionChunk], None]
    given_up: bool = False


class Worker:
    """Loads one pipeline in a thread of its own and keeps that thread busy with orders.

    Args:
        load: makes the pipeline; from `pipelines.base.resolve`.
        on_ready: called in the thread as soon as the pipeline is loaded.
        on_failed: called in the thread with one line when it cannot be loaded, or the thread breaks; the thread then ends.
    """

    def __init__(self, load: Loader, *, on_ready: Callable[[], None], on_failed: Callable[[str], None]) -> None:
        self._load = load
        self._on_ready = on_ready
        self._on_failed = on_failed
        self._changed = threading.Condition()
        self._waiting: deque[Job] = deque()
        self._current: Job | None = None
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="mlx", daemon=True)
        self.pipeline: Pipeline | None = None
        self.progress = 0.0
        self.memory = RunnerMemory()

    @property
    def busy(self) -> bool:
        """Whether a picture is in work or waits."""
        return self._current is not None or bool(self._waiting)

    def start(self) -> None:
        """Begin to load."""
        self._thread.start()

    def stop(self, timeout: float) -> bool:
        """Give up all work and end the thread; call it again to ask again.

        Args:
            timeout: seconds to wait for the step in work.

        Returns:
            Whether the thread has ended.
        """
        with self._changed:
            self._stopping = True
            self._changed.notify()
        self._thread.join(timeout)
        return not self._thread.is_alive()

    def submit(self, job: Job) -> None:
        """Put a job at the end of the queue.

        Raises:
            Loading: the pipeline is not there yet.
            QueueFull: `QUEUE` jobs wait already.
        """
        with self._changed:
            if self.pipeline is None:
                raise Loading("the model is still being loaded")
            if len(self._waiting) >= QUEUE:
                raise QueueFull(f"{QUEUE} requests wait already")
            self._waiting.append(job)
            self._changed.notify()

    def give_up(self, job: Job) -> None:
        """Forget a job: at once if it waits, between two steps if it is in work; nothing happens if it is finished."""
        with self._changed:
            job.given_up = True
            if job not in self._waiting:
                return
            self._waiting.remove(job)
        logger.info(GIVEN_UP)

    def _run(self) -> None:
        """Work until told to stop; a thread that breaks says so, as without it the process would only look healthy."""
        why = "the thread that makes pictures broke"
        try:
            self._work()
            why = ""
        except BaseException as error:  # noqa: BLE001 - nothing is above this
            why += f": {type(error).__name__}: {_one_line(error)}"
        finally:
            if why:
                self._on_failed(why)

    def _work(self) -> None:
        # Libraries written in Rust raise what is no Exception when they panic, as tokenizers do at some prompts.
        began = time.monotonic()
        try:
            _prepare_mlx()
            pipeline = self._load(self._note_progress)
        except ImportError as error:
            missing = "Pillow" if (error.name or "").startswith("PIL") else "MLX"
            self._on_failed(f"{missing} is not importable: {_one_line(error)}; mend: pip install 'mlxsup[imagegen]'")
            return
        except BaseException as error:  # noqa: BLE001 - whatever it is, the process says so in its last line and ends
            self._on_failed(f"the model cannot be loaded: {_one_line(error)}")
            return
        self._note_memory()
        with self._changed:
            self.pipeline = pipeline
        self._on_ready()
        logger.info("ready after %.2f s", time.monotonic() - began)
        while (job := self._next()) is not None:
            try:
                self._make(job, pipeline)
            except _GivenUpError:
                logger.info(GIVEN_UP)
            except BaseException as error:  # noqa: BLE001 - it fails this picture, and the next one may work
                # One line an event, so no traceback.
                logger.error("a picture failed: %s: %s", type(error).__name__, _one_line(error))  # noqa: TRY400
                job.deliver(CompletionChunk(content=f"error: {_one_line(error)}", done=True))
            self._note_memory()

    def _next(self) -> Job | None:
        with self._changed:
            self._current = None
            while not self._waiting and not self._stopping:
                self._changed.wait()
            if self._stopping:
                return None
            self._current = self._waiting.popleft()
            return self._current

    def _make(self, job: Job, pipeline: Pipeline) -> None:
        order = job.order
        began = time.monotonic_ns()
        steps = _Steps(job, self._check)
        picture = pipeline.generate(order, steps.on_step)
        self._check(job)
        image = encode(picture, job.output, job.settings)
        self._check(job)
        ended = time.monotonic_ns()
        self._note_memory()
        self._current = None  # whoever has read the last line must not find this runner busy with it
        job.deliver(
            CompletionChunk(
                image=image,
                done=True,
                seed=order.seed,
                step=order.steps,
                total=order.steps,
                stop_reason="stop",
                eval_count=order.steps - steps.first,
                eval_duration=ended - steps.began,
                prompt_eval_count=len(order.prompt.split()),
                prompt_eval_duration=steps.began - began,
            )
        )
        logger.info("made %d x %d in %d steps, %.2f s", order.width, order.height, order.steps, (ended - began) / 1e9)

    def _check(self, job: Job) -> None:
        """Stop the work if nobody wants it any more; note its memory."""
        if job.given_up or self._stopping:
            raise _GivenUpError
        self._note_memory()

    def _note_progress(self, progress: float) -> None:
        self.progress = max(self.progress, min(1.0, progress))

    def _note_memory(self) -> None:
        import mlx.core as mx

        self.memory = RunnerMemory(
            active=mx.get_active_memory(), peak=mx.get_peak_memory(), cache=mx.get_cache_memory()
        )


class _Steps:
    """Follows one picture from step to step: `first` steps were behind it when it `began`, in monotonic nanoseconds."""

    def __init__(self, job: Job, check: Callable[[Job], None]) -> None:
        self._job = job
        self._check = check
        self._shown: frozenset[int] | None = None
        self.first = 0
        self.began = time.monotonic_ns()

    def on_step(self, step: int, total: int, preview: Preview | None = None, /) -> None:
        """See `pipelines.base.OnStep`."""
        self._check(self._job)
        if self._shown is None:
            self._shown = preview_steps(self._job.output.previews, step, total)
            self.first, self.began = step, time.monotonic_ns()
        if step > 0:  # whoever took the request has sent step 0 already, while it waited
            self._job.deliver(CompletionChunk(step=step, total=total))
        if preview is not None and step in self._shown:
            self._show(preview, step, total)

    def _show(self, preview: Preview, step: int, total: int) -> None:
        """Send a picture of the work in progress; without one, the work goes on all the same."""
        try:
            picture = preview()
            picture.thumbnail(preview_size(*picture.size))
            image = encode(picture, self._job.output)
        except Exception as error:  # noqa: BLE001 - the picture itself may well come out
            # One line an event, so no traceback.
            logger.error("a preview failed: %s: %s", type(error).__name__, _one_line(error))  # noqa: TRY400
            return
        self._job.deliver(CompletionChunk(step=step, total=total, image=image, preview=True))


def _prepare_mlx() -> None:
    import mlx.core as mx

    mx.set_cache_limit(CACHE_LIMIT)
    if mx.default_device().type == mx.DeviceType.cpu:
        # Compiling for the CPU calls a C++ compiler and takes many seconds; there is little to gain from it.
        mx.disable_compile()


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
