"""Trees of files that look like /proc and /sys of some machine."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

GIB = 1024**3
MIB = 1024**2
UNLIMITED = 9223372036854771712

V2_MOUNT = "35 24 0:30 / /sys/fs/cgroup rw,nosuid shared:9 - cgroup2 cgroup2 rw,nsdelegate"
V1_MOUNT = "35 24 0:30 / /sys/fs/cgroup/memory rw shared:9 - cgroup cgroup rw,memory"


def meminfo(total: int = 16 * GIB, available: int | None = 8 * GIB, free: int = 2 * GIB) -> str:
    """What /proc/meminfo says; without available, as kernels before 3.14 do."""
    lines = {"MemTotal": total, "MemFree": free, "MemAvailable": available, "Buffers": MIB, "HugePages_Total": None}
    return "".join(f"{name}: {size // 1024:>12} kB\n" for name, size in lines.items() if size is not None)


def machine(
    root: Path,
    *,
    memory: str | None = None,
    cgroup: str = "0::/\n",
    mounts: str = V2_MOUNT,
    files: Mapping[str, object] | None = None,
) -> Path:
    """Write such a tree; `files` are below /sys/fs/cgroup."""
    contents: dict[str, object] = {
        "proc/meminfo": meminfo() if memory is None else memory,
        "proc/self/cgroup": cgroup,
        "proc/self/mountinfo": f"24 1 254:0 / / rw - ext4 /dev/root rw\n{mounts}\n",
    }
    contents |= {f"sys/fs/cgroup/{name}": content for name, content in (files or {}).items()}
    for name, content in contents.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else f"{content}\n".encode())
    return root
