"""What a value must be beyond its type; each rule travels with the type it is for, so that an engine's keys can use it too.

A rule is a function in `Meta(extra={"check": rule})` that returns the value to keep or raises ValueError with the reason.
"""

from __future__ import annotations

import difflib
import os
import re
import signal
from typing import Annotated, Final, Literal
from urllib.parse import urlsplit

import msgspec
from msgspec import Meta

from mlxsup.config.units import Duration, Size

VARIABLE: Final = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]*)\}")
"""`${NAME}` in the value of an environment variable; a `$` without a brace stands for itself."""

_LONGEST_SOCKET_PATH = 103
"""Bytes in a unix socket's path: macOS has 104 with the closing NUL, Linux four more."""

_LARGEST_PORT = 65535


class Listen(msgspec.Struct, frozen=True, kw_only=True):
    """Where the HTTP API listens: `path` of a unix socket, else `host` and `port` (0: any free one)."""

    host: str = ""
    port: int = 0
    path: str = ""

    @property
    def kind(self) -> Literal["unix", "tcp"]:
        """Which of the two this is."""
        return "unix" if self.path else "tcp"


def parse_listen(text: str) -> Listen:
    """Read `host:port`, `[IPv6]:port` or `unix:/path`.

    Raises:
        ValueError: it is none of them, with the nearest right form in the message.
    """
    if text.startswith("unix:"):
        return Listen(path=_socket_path(text.removeprefix("unix:")))
    if "://" in text:
        raise ValueError(f"{text!r} is a URL, write {urlsplit(text).netloc or 'host:port'!r}")
    host, colon, port = text.rpartition(":")
    if not colon:
        meant = f"127.0.0.1:{text}" if text.isdecimal() else f"{text}:11435"
        raise ValueError(f"expected host:port or unix:/path, not {text!r}; did you mean {meant!r}?")
    if not port.isascii() or not port.isdecimal() or int(port) > _LARGEST_PORT:
        raise ValueError(f"the port of {text!r} is not a number from 0 to {_LARGEST_PORT}")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    elif ":" in host:
        raise ValueError(f"an IPv6 address stands in brackets: '[{host}]:{port}'")
    if not host:
        raise ValueError(f"the host is missing: '127.0.0.1:{port}' for this machine alone, '0.0.0.0:{port}' for all")
    if any(letter.isspace() or letter in "/[]" for letter in host) or not _resolvable(host):
        raise ValueError(f"{host!r} is no host")
    return Listen(host=host, port=int(port))


def listen_address(text: str) -> str:
    """Check an address and return it as parse_listen reads it, with `~` filled in."""
    listen = parse_listen(text)
    return f"unix:{listen.path}" if listen.path else text


def web_origin(text: str) -> str:
    """Check an origin of web pages, and return it as browsers write it."""
    if text in {"*", "null", "file://"}:
        return text
    try:
        parts = urlsplit(text)
        whole = parts.scheme and parts.hostname and parts.port != 0
    except ValueError:  # of its brackets or its port
        parts, whole = urlsplit(""), None
    rest = parts._replace(scheme="", netloc="").geturl()
    if not whole or "@" in text or "*" in text or not text.isascii() or rest not in {"", "/"}:
        raise ValueError(f'expected an origin such as "https://ai.example.com", or "*" for all, not {text!r}')
    usual = {"http": ":80", "https": ":443"}.get(parts.scheme, "")
    return f"{parts.scheme}://{parts.netloc.lower().removesuffix(usual)}"


def home_path(text: str) -> str:
    """Fill in a leading `~`; the rest stays as it is written."""
    return os.path.expanduser(text)  # noqa: PTH111 - Path would rewrite `./model` and a closing slash


def placed(text: str, folder: str) -> str:
    """Return a path as it is seen from `folder`, if it begins with ./ or ../ or is there; else as it is: it may be a name."""
    if not folder or not text or text.startswith("/"):
        return text  # without a look: its disk may hang
    there = f"{folder}/{text.removeprefix('./')}"
    return there if text.startswith(("./", "../")) or os.path.lexists(there) else text


def not_negative(value: float) -> float:
    """Refuse negative numbers."""
    if value < 0:
        raise ValueError(f"must not be negative, got {value}")
    return value


def positive(value: float) -> float:
    """Refuse 0 and negative numbers."""
    if value <= 0:
        raise ValueError(f"must be more than 0, got {value}")
    return value


def signal_name(text: str) -> str:
    """Refuse what is no signal of this platform; "" is the engine's own."""
    names = signal.Signals.__members__
    if text and text not in names:
        close = difflib.get_close_matches(text.upper(), names, n=1)
        full = f"SIG{text.upper().removeprefix('SIG')}"
        meant = full if full in names else close[0] if close else ""
        raise ValueError(f"{text!r} is no signal" + (f", did you mean {meant}?" if meant else ", write a SIG name"))
    return text


def health_path(text: str) -> str:
    """Refuse what is neither a path on the runner nor "none"."""
    if text != "none" and not text.startswith("/"):
        raise ValueError(f'expected a path such as "/health", or "none", not {text!r}')
    if any(letter.isspace() for letter in text):
        raise ValueError(f"{text!r} holds white space")
    return text


def model_name(text: str) -> str:
    """Refuse names that could not be told apart by eye, or carried in a URL."""
    if not text or text != text.strip() or not text.isprintable():
        raise ValueError(f"{text!r} is no name: it must be printable and neither begin nor end with white space")
    return text


def environment_name(text: str) -> str:
    """Refuse what no environment can hold."""
    if not text or "=" in text or "\0" in text:
        raise ValueError(f"{text!r} is no name of an environment variable")
    return text


def environment_value(text: str) -> str:
    """Refuse a NUL, and a `${` that is not the beginning of `${NAME}`."""
    if "\0" in text:
        raise ValueError("holds a NUL character")
    if "${" in VARIABLE.sub(" ", text):
        raise ValueError(f"write ${{NAME}} for a variable, not {text!r}")
    return text


def _resolvable(host: str) -> bool:
    """Tell whether a resolver may be asked for it: `a..b` makes Python's raise what is no OSError."""
    try:
        host.encode("idna")
    except UnicodeError:
        return False
    return True


def _socket_path(text: str) -> str:
    path = home_path(text)
    if not path.startswith("/"):
        raise ValueError(f"the path of a unix socket begins with / or ~, not {text!r}")
    if len(os.fsencode(path)) > _LONGEST_SOCKET_PATH:
        raise ValueError(f"{path!r} is longer than the {_LONGEST_SOCKET_PATH} bytes a unix socket's path may have")
    return path


Timeout = Annotated[Duration, Meta(extra={"check": positive})]
"""A duration that ends: more than 0."""

Interval = Annotated[Duration, Meta(extra={"check": not_negative})]
"""A duration of 0 or more."""

Count = Annotated[int, Meta(ge=1)]
PositiveSize = Annotated[Size, Meta(extra={"check": positive})]
PathText = Annotated[str, Meta(extra={"check": home_path, "place": placed})]
"""A path, or for models also a name: `~` and, in a file, what is relative to the file's folder are filled in."""
ListenAddress = Annotated[str, Meta(extra={"check": listen_address})]
WebOrigin = Annotated[str, Meta(extra={"check": web_origin})]
SignalName = Annotated[str, Meta(extra={"check": signal_name})]
HealthPath = Annotated[str, Meta(extra={"check": health_path})]
ModelName = Annotated[str, Meta(extra={"check": model_name})]
EnvironmentName = Annotated[str, Meta(extra={"check": environment_name})]
EnvironmentValue = Annotated[str, Meta(extra={"check": environment_value})]
