"""The table of verbs, and the one place where a failure becomes a line on stderr and an exit code."""

from __future__ import annotations

import errno
import signal
import sys
from collections.abc import Sequence

from cyclopts import App, CycloptsError

from mlxsup._version import __version__
from mlxsup.cli import streams
from mlxsup.cli.failures import FAILED, OK, USAGE, exit_code_of, lines_of, say
from mlxsup.errors import MlxsupError

app = App(
    name="mlxsup",
    help="Run local models in supervised processes: from the shell, or as a daemon with an HTTP API.",
    version=__version__,
    result_action="return_value",
    exit_on_error=False,
    print_error=False,
    suppress_keyboard_interrupt=False,
)
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EBADF)
"""What writing to stdout may raise, which has no file name."""

_config = App(name="config", help="Look at the configuration.")

app.command("mlxsup.cli.run:run", name="run", help="Ask a model for a picture or a text.")
app.command("mlxsup.cli.show:show", name="show", help="Tell how a picture was made: its prompt, seed and settings.")
app.command("mlxsup.cli.serve:serve", name="serve", help="Run the daemon.")
app.command("mlxsup.cli.runners:ps", name="ps", help="List the daemon's runners.")
app.command("mlxsup.cli.runners:load", name="load", help="Load a model in the daemon; returns when it is ready.")
app.command(
    "mlxsup.cli.runners:stop", name="stop", help="Unload a model in the daemon; returns when its process is gone."
)
app.command("mlxsup.cli.runner:runner", name="runner", help="Be a runner: serve one model on a socket or a port.")
app.command("mlxsup.cli.estimate:estimate", name="estimate", help="Tell how much memory a model will need.")
app.command(
    "mlxsup.cli.explain:explain", name="explain", help="Tell what would happen if a model were asked for now, and why."
)
app.command(
    "mlxsup.cli.simulate:simulate",
    name="simulate",
    help="Replay a load in virtual time: hits, loads, evictions, waits.",
)
app.command(_config)
_config.command("mlxsup.cli.config:check", name="check", help="Read the configuration and report every problem in it.")
_config.command(
    "mlxsup.cli.config:show", name="show", help="Print the configuration in effect, and the file it came from."
)
_config.command("mlxsup.cli.config:schema", name="schema", help="Print the JSON schema of the configuration.")


def main(tokens: Sequence[str] | None = None) -> int:
    """Run one command line and return its exit code: 0, 1 failed, 2 usage, 128 + n ended by signal n."""
    streams.make_usable()
    try:
        code = _run(tokens)
        sys.stdout.flush()
    except BrokenPipeError:  # the reader of our output has left, as `head` does
        streams.give_up_stdout()
        return FAILED
    except OSError as error:
        streams.give_up_stdout()
        say(_reason(error))
        return FAILED
    return code


def _run(tokens: Sequence[str] | None) -> int:
    try:
        code = app(tokens)
    except CycloptsError as error:
        say(f"{_one_line(error)}; see {' '.join((app.name[0], *(error.command_chain or ())))} --help")
        return USAGE
    except MlxsupError as error:
        for line in lines_of(error):
            say(line)
        return exit_code_of(error)
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    return code if isinstance(code, int) else OK


def _one_line(error: CycloptsError) -> str:
    return " ".join(str(error).split()).rstrip(".")


def _reason(error: OSError) -> str:
    why = error.strerror or str(error) or type(error).__name__
    if error.filename:
        return f"{error.filename}: {why}"
    return f"the output cannot be written: {why}" if error.errno in _NO_ROOM else why
