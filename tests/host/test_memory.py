"""RAM within the limits of control groups: trees of both versions, and a real group of version 1 where there may be one."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from mlxsup.host import Gauge, devices, memory, ram
from mlxsup.host.cgroups import limits

from .trees import GIB, MIB, UNLIMITED, V1_MOUNT, V2_MOUNT, machine, meminfo


def total_and_free(root: Path) -> tuple[int, int]:
    """Return what the device cpu has; nothing about it is in doubt, and the gauge says the same."""
    found = ram(root=root)
    assert found.reasons == ()
    gauge = Gauge(root)
    gauge.survey()
    assert gauge.free() == found.devices[0].free
    (device,) = found.devices
    assert (device.name, device.kind, device.minimum) == ("cpu", "cpu", 457 * MIB)
    return device.total, device.free


def test_without_limits_it_is_what_the_kernel_calls_available(tmp_path: Path) -> None:
    assert total_and_free(machine(tmp_path)) == (16 * GIB, 8 * GIB)


def test_old_kernels_tell_only_what_is_free(tmp_path: Path) -> None:
    assert total_and_free(machine(tmp_path, memory=meminfo(available=None))) == (16 * GIB, 2 * GIB)


def test_this_machine_is_as_psutil_sees_it() -> None:
    found, judged = ram().devices[0], psutil.virtual_memory()
    assert found.total <= judged.total
    assert 0 < found.free <= judged.total
    assert abs(found.free - judged.available) < GIB or found.total < judged.total


# Version 2


def v2(
    maximum: object = "max", high: object = "max", current: int = GIB, inactive: int = 0, at: str = ""
) -> dict[str, object]:
    """The files of one group."""
    return {
        f"{at}memory.max": maximum,
        f"{at}memory.high": high,
        f"{at}memory.current": current,
        f"{at}memory.stat": f"anon 1\nfile 2\ninactive_anon 5\ninactive_file {inactive}\nactive_file 7",
    }


def test_v2_limit_counts_with_cache_given_back(tmp_path: Path) -> None:
    root = machine(
        tmp_path, cgroup="0::/app.slice\n", files=v2(4 * GIB, current=3 * GIB, inactive=2 * GIB, at="app.slice/")
    )

    assert total_and_free(root) == (4 * GIB, 3 * GIB)


def test_v2_high_counts_as_a_limit(tmp_path: Path) -> None:
    root = machine(tmp_path, cgroup="0::/a\n", files=v2(4 * GIB, 2 * GIB, current=GIB, at="a/"))

    assert total_and_free(root) == (2 * GIB, GIB)


def test_v2_groups_above_count_too(tmp_path: Path) -> None:
    files = {
        **v2("max", at="user.slice/one/two/"),
        **v2(6 * GIB, current=5 * GIB, at="user.slice/one/"),
        **v2("max", 5 * GIB, current=GIB, at="user.slice/"),
    }
    root = machine(tmp_path, cgroup="0::/user.slice/one/two\n", files=files)

    assert total_and_free(root) == (5 * GIB, GIB)


def test_v2_a_group_beyond_its_limit_has_nothing_free(tmp_path: Path) -> None:
    root = machine(tmp_path, cgroup="0::/a\n", files=v2(GIB, current=2 * GIB, at="a/"))

    assert total_and_free(root) == (GIB, 0)


def test_v2_limits_above_the_machine_s_memory_change_nothing(tmp_path: Path) -> None:
    root = machine(tmp_path, cgroup="0::/a\n", files=v2(64 * GIB, current=GIB, at="a/"))

    assert total_and_free(root) == (16 * GIB, 8 * GIB)


def test_v2_a_container_sees_its_own_group_as_the_root(tmp_path: Path) -> None:
    assert total_and_free(machine(tmp_path, files=v2(2 * GIB, current=GIB))) == (2 * GIB, GIB)


@pytest.mark.parametrize("path", ["/docker/abc", "/../../elsewhere", "/docker/other"])
def test_v2_a_container_with_the_host_s_view_of_its_path(tmp_path: Path, path: str) -> None:
    mounts = V2_MOUNT.replace(" / /sys", " /docker/abc /sys")
    root = machine(tmp_path, cgroup=f"0::{path}\n", mounts=mounts, files=v2(2 * GIB, current=GIB))

    assert total_and_free(root) == (2 * GIB, GIB)


def test_v2_mounted_somewhere_else_in_a_name_with_a_space(tmp_path: Path) -> None:
    mounts = V2_MOUNT.replace("/sys/fs/cgroup", r"/sys/fs/cgroup/my\040groups")
    root = machine(tmp_path, cgroup="0::/a\n", mounts=mounts, files=v2(2 * GIB, current=GIB, at="my groups/a/"))

    assert total_and_free(root) == (2 * GIB, GIB)


# The gauge


def test_a_gauge_follows_what_is_used_and_asks_of_the_cache_only_where_it_is_tight(tmp_path: Path) -> None:
    root = machine(tmp_path, cgroup="0::/a\n", files=v2(10 * GIB, current=GIB, inactive=GIB, at="a/"))
    gauge = Gauge(root)
    assert gauge.free() == 8 * GIB  # no survey yet
    gauge.survey()
    group = root / "sys/fs/cgroup/a"
    (group / "memory.stat").rename(group / "hidden")
    (limit,) = limits(root)[0]
    assert limit.left(8 * GIB) == 9 * GIB  # no need to know more
    with pytest.raises(FileNotFoundError):
        limit.left(10 * GIB)
    (group / "hidden").rename(group / "memory.stat")
    (group / "memory.current").write_text(f"{4 * GIB}\n")
    assert gauge.free() == 7 * GIB
    (group / "memory.current").write_text(f"{12 * GIB}\n")
    assert gauge.free() == 0
    (root / "proc/meminfo").write_text(meminfo(available=None))
    (group / "memory.current").write_text("0\n")
    assert gauge.free() == 2 * GIB


def test_a_gauge_learns_of_another_limit_by_a_survey_and_forgets_a_group_that_is_gone(tmp_path: Path) -> None:
    root = machine(tmp_path, cgroup="0::/a\n", files=v2(4 * GIB, current=GIB, at="a/"))
    gauge = Gauge(root)
    gauge.survey()
    (root / "sys/fs/cgroup/a/memory.max").write_text(f"{2 * GIB}\n")
    assert gauge.free() == 3 * GIB
    gauge.survey()
    assert gauge.free() == GIB
    (root / "sys/fs/cgroup/a/memory.current").unlink()
    assert gauge.free() == 8 * GIB


# Version 1


def v1(
    limit: int = UNLIMITED, usage: int = GIB, inactive: int = 0, hierarchy: int = 1, at: str = ""
) -> dict[str, object]:
    """The files of one group."""
    return {
        f"memory/{at}memory.limit_in_bytes": limit,
        f"memory/{at}memory.usage_in_bytes": usage,
        f"memory/{at}memory.stat": f"cache 1\ninactive_file 1\ntotal_inactive_file {inactive}",
        f"memory/{at}memory.use_hierarchy": hierarchy,
    }


def test_v1_groups_count_up_to_the_root(tmp_path: Path) -> None:
    files = {
        **v1(at="one/two/"),
        **v1(4 * GIB, usage=3 * GIB, inactive=GIB, at="one/"),
        **v1(),
    }
    cgroup = "9:name=systemd:/\n8:pids:/x\n4:cpu,memory:/one/two\n0::/\n"
    root = machine(tmp_path, cgroup=cgroup, mounts=V1_MOUNT, files=files)

    assert total_and_free(root) == (4 * GIB, 2 * GIB)


def test_v1_groups_that_do_not_count_their_children_set_no_limit(tmp_path: Path) -> None:
    files = {**v1(3 * GIB, at="one/two/", hierarchy=0), **v1(GIB, at="one/", hierarchy=0)}
    root = machine(tmp_path, cgroup="4:memory:/one/two\n", mounts=V1_MOUNT, files=files)

    assert total_and_free(root) == (3 * GIB, 2 * GIB)


def test_v1_a_container_with_the_host_s_view_of_its_path(tmp_path: Path) -> None:
    mounts = V1_MOUNT.replace(" / /sys", " /docker/abc /sys")
    root = machine(tmp_path, cgroup="4:memory:/docker/abc\n", mounts=mounts, files=v1(2 * GIB))

    assert total_and_free(root) == (2 * GIB, GIB)


def test_both_versions_mounted_side_by_side(tmp_path: Path) -> None:
    mounts = V1_MOUNT + "\n" + V2_MOUNT.replace("/sys/fs/cgroup", "/sys/fs/cgroup/unified")
    files = {**v1(3 * GIB, at="a/"), "unified/b/cgroup.procs": ""}
    root = machine(tmp_path, cgroup="4:memory:/a\n0::/b\n", mounts=mounts, files=files)

    assert total_and_free(root) == (3 * GIB, 2 * GIB)


# What cannot be understood


def test_files_that_make_no_sense_are_left_out_with_the_reason(tmp_path: Path) -> None:
    files = {**v2("lots", 4 * GIB, at="a/"), "a/memory.current": "-1"}
    found = ram(root=machine(tmp_path, cgroup="0::/a\n", files=files))

    assert (found.devices[0].total, found.devices[0].free) == (4 * GIB, 4 * GIB)
    folder = tmp_path / "sys/fs/cgroup/a"
    assert found.reasons == (
        f"{folder}/memory.max: no number: 'lots'",
        f"{folder}/memory.current: no number: '-1'",
        f"{folder}/memory.current: not there; taken for 0",
    )


def test_files_that_cannot_be_read_are_left_out_with_the_reason(tmp_path: Path) -> None:
    root = machine(tmp_path, cgroup="0::/a\n", files=v2(4 * GIB, at="a/"))
    (root / "sys/fs/cgroup/a/memory.high").unlink()
    (root / "sys/fs/cgroup/a/memory.high").mkdir()

    found = ram(root=root)

    assert found.devices[0].total == 4 * GIB
    assert found.reasons == (f"{root}/sys/fs/cgroup/a/memory.high: cannot be read: Is a directory",)


@pytest.mark.parametrize("mounts", ["", "garbage", "1 2 3", V1_MOUNT, "35 24 0:30 / /sys/fs/cgroup rw - cgroup2"])
@pytest.mark.parametrize("cgroup", ["", "garbage", "::::", "0::", "x:memory:/a", b"0::/\xff\n"])
def test_a_tree_that_is_none_sets_no_limit(tmp_path: Path, mounts: str, cgroup: object) -> None:
    root = machine(tmp_path, mounts=mounts)
    (root / "proc/self/cgroup").write_bytes(cgroup if isinstance(cgroup, bytes) else str(cgroup).encode())

    assert total_and_free(root) == (16 * GIB, 8 * GIB)


NODE = """\
Node {0} MemTotal:       7 kB
Node {0} MemFree:        6 kB
Node {0} Active:         5 kB
Node {0} Active(file):   {1} kB
Node {0} Inactive(file): {1} kB
Node {0} SReclaimable:   {1} kB
Node {0} HugePages_Total:     0
"""


@pytest.mark.skipif(sys.platform != "linux", reason="Linux's /sys")
def test_where_proc_has_processes_alone_caches_of_the_nodes_and_groups_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    facts = {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": 2 * GIB // 4096, "SC_AVPHYS_PAGES": GIB // 4 // 4096}
    monkeypatch.setattr(os, "sysconf", facts.__getitem__)
    root = machine(tmp_path, cgroup="0::/a\n", files=v2(3 * GIB, current=3 * GIB, inactive=2 * GIB, at="a/"))
    (root / "proc/meminfo").unlink()
    for node in range(2):
        folder = root / f"sys/devices/system/node/node{node}"
        folder.mkdir(parents=True)
        (folder / "meminfo").write_text(NODE.format(node, GIB // 8 // 1024))
    assert total_and_free(root) == (2 * GIB, GIB)
    (root / "sys/fs/cgroup/a/memory.max").write_text(str(GIB))
    (root / "sys/fs/cgroup/a/memory.current").write_text(str(2 * GIB + 500 * MIB))
    assert total_and_free(root) == (GIB, GIB - 500 * MIB)


@pytest.mark.skipif(sys.platform != "linux", reason="Linux's /sys")
def test_what_is_told_without_meminfo_is_about_what_the_kernel_calls_available() -> None:
    if not any(Path("/sys/devices/system/node").glob("node*/meminfo")):
        pytest.skip("a kernel without NUMA")
    total, free = memory._without_meminfo(Path("/"))
    judged = psutil.virtual_memory()
    assert total == judged.total
    assert free == pytest.approx(judged.available, abs=GIB)


def test_where_no_file_tells_the_system_does(tmp_path: Path) -> None:
    found = ram(root=tmp_path)
    assert found.devices[0].total == psutil.virtual_memory().total
    assert 0 < found.devices[0].free <= found.devices[0].total
    assert found.reasons == ()
    if sys.platform == "linux":
        assert 0 < Gauge(tmp_path).free() <= found.devices[0].total

    found = ram(root=machine(tmp_path, memory="MemFoo: 1 kB"))
    assert found.devices[0].total == psutil.virtual_memory().total
    assert "no MemTotal in it" in found.reasons[0]


def test_devices_of_linux_are_its_ram_where_there_is_no_card(tmp_path: Path) -> None:
    found = devices(platform="linux", root=machine(tmp_path))

    assert [device.name for device in found.devices] == ["cpu"]
    assert found.reasons == ()


# A real group


@pytest.fixture
def group() -> Iterator[Path]:
    """Make a control group of version 1 below our own, and one in it, where we may."""
    own = next(
        (line.split(":", 2)[2] for line in Path("/proc/self/cgroup").read_text().splitlines() if ":memory:" in line),
        None,
    )
    above = Path(f"/sys/fs/cgroup/memory{own}/mlxsup-test-{os.getpid()}")
    if own is None:
        pytest.skip("no control groups of version 1 here")
    try:
        above.mkdir()
        (above / "inner").mkdir()
    except OSError as error:
        pytest.skip(f"no control group may be made here: {error}")
    try:
        yield above
    finally:
        for folder in (above / "inner", above):
            with contextlib.suppress(OSError):
                folder.rmdir()


SEEN_FROM_INSIDE = """
import sys, pathlib
pathlib.Path(sys.argv[1], "cgroup.procs").write_text("0")
held = bytearray(int(sys.argv[2]))
from mlxsup.host import ram
found = ram()
print(found.devices[0].total, found.devices[0].free, len(found.reasons))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="control groups are Linux's")
def test_a_real_v1_group_and_the_one_above_it(group: Path) -> None:
    def inside(held: int) -> tuple[int, int]:
        command = [sys.executable, "-c", SEEN_FROM_INSIDE, str(group / "inner"), str(held)]
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=15)
        total, free, reasons = map(int, done.stdout.split())
        assert reasons == 0
        return total, free

    (group / "inner/memory.limit_in_bytes").write_text(str(700 * MIB))
    total, free = inside(0)
    assert total == 700 * MIB
    assert 600 * MIB < free < 700 * MIB

    (group / "memory.limit_in_bytes").write_text(str(400 * MIB))
    total, free = inside(100 * MIB)
    assert total == 400 * MIB
    assert 200 * MIB < free < 300 * MIB
