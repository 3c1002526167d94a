"""Where a benchmark runs: what each of them prints above its table."""

from __future__ import annotations

import os
import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import syncstream


def describe(*packages: str) -> str:
    """Return two lines: the machine, and the versions of what is compared."""
    load = " ".join(f"{value:.2f}" for value in os.getloadavg())
    versions = [f"Python {platform.python_version()}"]
    versions.append(f"syncstream {syncstream.__version__}")
    versions += [f"{name} {_version(name)}" for name in packages]
    return (
        f"{platform.system()} {platform.release()} {platform.machine()}, {_cpu()},"
        f" {os.cpu_count()} CPUs, load {load}\n{', '.join(versions)}"
    )


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "is not installed"


def _cpu() -> str:
    if sys.platform == "linux":
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            name, _, value = line.partition(":")
            if name.strip() == "model name":
                return value.strip()
    return platform.processor() or "unknown CPU"


def verdict(is_met: bool) -> str:
    return "PASS" if is_met else "FALLS SHORT"
