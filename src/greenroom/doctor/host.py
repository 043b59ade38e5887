"""The host's memory as the kernel's files tell it: what is there, and what this process may have.

Inside a container the machine's own numbers say too much: a control group (cgroup) may grant the
process less. Both versions of control groups are read.

Reading the text of a file is one function, finding and opening it another.
"""

from __future__ import annotations

import resource
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

#: Version 1 says "no limit" with the largest multiple of a page below 2**63.
_NO_LIMIT = 2**62


@dataclass(frozen=True)
class CgroupMemory:
    """What one control group may have and has.

    reclaimable_bytes: the part of `used_bytes` that is cached files, which the kernel drops when
        memory is needed.
    """

    limit_bytes: int
    used_bytes: int
    reclaimable_bytes: int = 0

    @property
    def available_bytes(self) -> int:
        """What may still be allocated."""
        return max(0, self.limit_bytes - self.used_bytes + self.reclaimable_bytes)


@dataclass(frozen=True)
class Host:
    """Host memory, in bytes.

    available_bytes: what this process can really have, its control group's limit considered.
    cgroup_limit_bytes: None if nothing limits the process.
    memlock_limit_bytes: ``ulimit -l``; None if unlimited. Drivers of GPUs mostly lock pages by
        themselves and do not ask for it.
    """

    total_bytes: int
    available_bytes: int
    cgroup_limit_bytes: int | None = None
    memlock_limit_bytes: int | None = None
    is_wsl: bool = False


# ---- what the texts say


def parse_meminfo(text: str) -> dict[str, int]:
    """``/proc/meminfo`` in bytes, by name.

    >>> parse_meminfo("MemTotal:       24684084 kB")
    {'MemTotal': 25276502016}
    """
    found = {}
    for line in text.splitlines():
        name, _, value = line.partition(":")
        words = value.split()
        if words and words[0].isdigit():
            found[name] = int(words[0]) * (1024 if words[1:] == ["kB"] else 1)
    return found


def parse_limit(text: str) -> int | None:
    """``memory.max`` or ``memory.limit_in_bytes``: bytes, or None for no limit."""
    word = text.strip()
    if not word.isdigit() or int(word) >= _NO_LIMIT:
        return None
    return int(word)


def parse_stat(text: str) -> dict[str, int]:
    """``memory.stat``: a name and a number in each line."""
    pairs = (line.split() for line in text.splitlines())
    return {pair[0]: int(pair[1]) for pair in pairs if len(pair) == 2 and pair[1].isdigit()}


def parse_cgroups(text: str) -> tuple[str | None, str | None]:
    """``/proc/self/cgroup``: the process's group in version 2, and version 1's for memory.

    >>> parse_cgroups("0::/user")
    ('/user', None)
    """
    unified = memory = None
    for line in text.splitlines():
        number, controllers, path = (*line.split(":", 2), "", "")[:3]
        if number == "0" and not controllers:
            unified = path
        elif "memory" in controllers.split(","):
            memory = path
    return unified, memory


def is_wsl(release: str) -> bool:
    """Whether the kernel, by its release, is that of the Windows Subsystem for Linux."""
    return "microsoft" in release.lower()


def combine(
    meminfo: Mapping[str, int],
    groups: list[CgroupMemory],
    memlock_limit_bytes: int | None,
    release: str,
) -> Host:
    """The host, from what its files say."""
    total = meminfo.get("MemTotal", 0)
    available = meminfo.get("MemAvailable", meminfo.get("MemFree", 0))
    # A limit beyond the machine's memory limits nothing.
    limiting = [group for group in groups if group.limit_bytes < total]
    return Host(
        total,
        min([available, *(group.available_bytes for group in limiting)]),
        min((group.limit_bytes for group in limiting), default=None),
        memlock_limit_bytes,
        is_wsl(release),
    )


# ---- where the texts are


def read_host(root: Path = Path("/")) -> Host:
    """The host this process runs on. `root`: where its files lie."""
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    return combine(
        parse_meminfo(_read(root / "proc/meminfo") or ""),
        list(read_groups(root)),
        None if soft == resource.RLIM_INFINITY or soft >= _NO_LIMIT else soft,
        _read(root / "proc/sys/kernel/osrelease") or "",
    )


def read_groups(root: Path = Path("/")) -> Iterator[CgroupMemory]:
    """The process's control groups that limit memory: its own, and those around it."""
    unified, memory = parse_cgroups(_read(root / "proc/self/cgroup") or "")
    mounts = root / "sys/fs/cgroup"
    version_2 = ("memory.max", "memory.current", "inactive_file")
    version_1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
    for path, mount, (limit_name, used_name, cached_name) in (
        (unified, mounts, version_2),
        (memory, mounts / "memory", version_1),
    ):
        if path is None:
            continue
        # In a container the path may be the host's, and the group itself lie at the mount.
        own = PurePosixPath(path.lstrip("/"))
        for folder in (mount / own, *(mount / parent for parent in own.parents)):
            limit = parse_limit(_read(folder / limit_name) or "")
            used = parse_limit(_read(folder / used_name) or "")
            if limit is not None and used is not None:
                stat = parse_stat(_read(folder / "memory.stat") or "")
                yield CgroupMemory(limit, used, stat.get(cached_name, 0))


def _read(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
