"""What the kernel's files say about host memory, by their texts."""

from __future__ import annotations

from pathlib import Path

import pytest

from greenroom.doctor.host import (
    CgroupMemory,
    Host,
    combine,
    is_wsl,
    parse_cgroups,
    parse_limit,
    parse_meminfo,
    parse_stat,
    read_host,
)

GIB = 2**30


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("MemTotal:  1024 kB\nMemFree: 1 kB\n", {"MemTotal": 2**20, "MemFree": 1024}),
        ("HugePages_Total:       3\n", {"HugePages_Total": 3}),
        ("no line of it\n\nMemTotal: many kB\n", {}),
        ("", {}),
    ],
)
def test_meminfo(text: str, expected: dict[str, int]) -> None:
    assert parse_meminfo(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("max\n", None),
        ("8589934592\n", 8 * GIB),
        ("9223372036854771712\n", None),  # version 1's way to say max
        ("0\n", 0),
        ("", None),
        ("-1", None),
    ],
)
def test_limits(text: str, expected: int | None) -> None:
    assert parse_limit(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("0::/\n", ("/", None)),
        ("0::/user.slice/session.scope\n", ("/user.slice/session.scope", None)),
        ("4:memory:/docker/1f\n1:cpu:/\n0::/system\n", ("/system", "/docker/1f")),
        ("5:cpuset,memory:/a:b\n", (None, "/a:b")),
        ("9:name=systemd:/\n", (None, None)),
        ("", (None, None)),
    ],
)
def test_cgroups(text: str, expected: tuple[str | None, str | None]) -> None:
    assert parse_cgroups(text) == expected


def test_stat() -> None:
    assert parse_stat("anon 5\ninactive_file 7\n\nodd line here\n") == {
        "anon": 5,
        "inactive_file": 7,
    }


@pytest.mark.parametrize(
    ("release", "expected"),
    [
        ("5.15.153.1-microsoft-standard-WSL2", True),
        ("4.4.0-19041-Microsoft", True),
        ("6.8.0-45-generic", False),
        ("", False),
    ],
)
def test_wsl(release: str, expected: bool) -> None:
    assert is_wsl(release) is expected


MEMINFO = {"MemTotal": 64 * GIB, "MemAvailable": 50 * GIB}


@pytest.mark.parametrize(
    ("groups", "available", "limit"),
    [
        ([], 50, None),
        ([CgroupMemory(8 * GIB, 3 * GIB)], 5, 8),
        ([CgroupMemory(8 * GIB, 3 * GIB, 1 * GIB)], 6, 8),  # cached files give way
        ([CgroupMemory(8 * GIB, 9 * GIB)], 0, 8),
        ([CgroupMemory(8 * GIB, 1 * GIB), CgroupMemory(12 * GIB, 9 * GIB)], 3, 8),
        ([CgroupMemory(60 * GIB, 1 * GIB)], 50, 60),  # the machine is fuller than the group
        ([CgroupMemory(64 * GIB, 60 * GIB)], 50, None),  # no less than the machine has
    ],
)
def test_what_is_available(groups: list[CgroupMemory], available: int, limit: int | None) -> None:
    expected = Host(
        64 * GIB, available * GIB, None if limit is None else limit * GIB, 2**16, is_wsl=False
    )
    assert combine(MEMINFO, groups, 2**16, "6.8.0") == expected


def test_old_kernels_do_not_tell_what_is_available() -> None:
    assert combine({"MemTotal": 2 * GIB, "MemFree": GIB}, [], None, "").available_bytes == GIB


def write(root: Path, **files: str) -> None:
    for name, text in files.items():
        path = root / name.replace("__", "/").replace("_DOT_", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")


KERNEL = {
    "proc__meminfo": f"MemTotal: {64 * 2**20} kB\nMemAvailable: {50 * 2**20} kB\n",
    "proc__sys__kernel__osrelease": "6.8.0-generic\n",
}


def test_version_2_limits_by_the_group_and_by_those_around_it(tmp_path: Path) -> None:
    group = "sys__fs__cgroup__a__b__memory_DOT_"
    around = "sys__fs__cgroup__a__memory_DOT_"
    write(tmp_path, **KERNEL, proc__self__cgroup="0::/a/b\n")
    write(tmp_path, **{f"{group}max": "max\n", f"{group}current": f"{GIB}\n"})
    write(tmp_path, **{f"{around}max": f"{8 * GIB}\n", f"{around}current": f"{5 * GIB}\n"})
    write(tmp_path, **{f"{around}stat": f"anon 1\ninactive_file {2 * GIB}\n"})
    host = read_host(tmp_path)
    assert (host.available_bytes, host.cgroup_limit_bytes) == (5 * GIB, 8 * GIB)


@pytest.mark.parametrize("folder", ["", "__docker__1f"])
def test_version_1_limits_also_where_the_path_is_the_hosts(tmp_path: Path, folder: str) -> None:
    group = f"sys__fs__cgroup__memory{folder}__memory_DOT_"
    write(tmp_path, **KERNEL, proc__self__cgroup="4:memory:/docker/1f\n0::/\n")
    write(tmp_path, **{f"{group}limit_in_bytes": f"{4 * GIB}\n"})
    write(tmp_path, **{f"{group}usage_in_bytes": f"{3 * GIB}\n"})
    write(tmp_path, **{f"{group}stat": f"inactive_file 1\ntotal_inactive_file {GIB}\n"})
    host = read_host(tmp_path)
    assert (host.available_bytes, host.cgroup_limit_bytes) == (2 * GIB, 4 * GIB)


def test_this_machine_is_read() -> None:
    host = read_host()
    assert 0 < host.available_bytes <= host.total_bytes
    assert host.cgroup_limit_bytes is None or host.cgroup_limit_bytes < host.total_bytes


def test_a_system_without_these_files_has_nothing_to_tell(tmp_path: Path) -> None:
    host = read_host(tmp_path)
    assert (host.total_bytes, host.available_bytes, host.cgroup_limit_bytes) == (0, 0, None)
