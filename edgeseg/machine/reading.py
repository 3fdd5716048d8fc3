"""What ``/proc``, ``/sys`` and control groups tell: small files, memory, and what a container may use; ``None`` where nothing."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


def read_text(path: Path) -> str | None:
    """A small file's text without surrounding white space and zero bytes; ``None`` if it cannot be read or is empty."""
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip("\x00 \n\t") or None
    except OSError:
        return None


def read_number(path: Path) -> float | None:
    """A file that holds one number; ``None`` if it does not."""
    text = read_text(path)
    try:
        return None if text is None else float(text)
    except ValueError:
        return None


def read_sizes(path: Path) -> dict[str, int]:
    """Bytes by name, of a file with lines such as ``MemTotal: 16384 kB``; empty if it cannot be read."""
    sizes = {}
    for line in (read_text(path) or "").splitlines():
        name, _, rest = line.partition(":")
        kib = rest.removesuffix(" kB").strip()
        if kib.isdigit():
            sizes[name] = int(kib) * 1024
    return sizes


@dataclass(frozen=True)
class Memory:
    """Bytes of main memory; ``None`` where the system does not tell or sets no limit."""

    total_bytes: int | None
    available_bytes: int | None
    limit_bytes: int | None


def core_limit(root: Path = Path("/sys/fs/cgroup"), membership: Path = Path("/proc/self/cgroup")) -> float | None:
    """CPUs the control group of this process may use at once (version 2 and 1), ``None`` without a limit."""
    limits = []
    for folder in _cgroup_folders(root, membership, "cpu"):
        words = (read_text(folder / "cpu.max") or "").split()
        quota, period = (
            (words[0], words[1])
            if len(words) == 2
            else (read_text(folder / "cpu.cfs_quota_us"), read_text(folder / "cpu.cfs_period_us"))
        )
        if quota and period and quota.isdigit() and period.isdigit() and int(period) > 0:
            limits.append(int(quota) / int(period))
    return min(limits, default=None)


def memory_limit_bytes(root: Path = Path("/sys/fs/cgroup"), membership: Path = Path("/proc/self/cgroup")) -> int | None:
    """Bytes the control group of this process may use, ``None`` without a limit."""
    limits = []
    for folder in _cgroup_folders(root, membership, "memory"):
        text = read_text(folder / "memory.max") or read_text(folder / "memory.limit_in_bytes")
        # Version 1 writes "no limit" as the largest page-aligned number.
        if text and text.isdigit() and int(text) < 1 << 60:
            limits.append(int(text))
    return min(limits, default=None)


def read_memory(meminfo: Path = Path("/proc/meminfo")) -> Memory:
    """Total, available and permitted memory."""
    sizes = read_sizes(meminfo)
    return Memory(sizes.get("MemTotal"), sizes.get("MemAvailable"), memory_limit_bytes())


def _cgroup_folders(root: Path, membership: Path, controller: str) -> list[Path]:
    """The group of this process and its ancestors: the tightest limit on the way up holds."""
    folders = {root, root / controller}
    for line in (read_text(membership) or "").splitlines():
        parts = line.split(":", 2)
        if len(parts) != 3 or ".." in parts[2] or (parts[1] and controller not in parts[1].split(",")):
            continue
        base = root / controller if parts[1] else root
        relative = Path(parts[2].lstrip("/"))
        folders.update(base / part for part in (relative, *relative.parents))
    return sorted(folders)
