"""The description of the machine on which the benchmark ran."""

from __future__ import annotations

import os
import platform
import statistics
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import psutil

_PACKAGES = (
    "twisted",
    "psycopg2-binary",
    "psycopg-binary",
    "orjson",
    "jsonschema-rs",
    "cryptography",
    "grpcio",
    "procrastinate",
    "nats-py",
)


def describe(postgres: str) -> dict[str, str]:
    """Describe the machine and the software.

    :param postgres: the version of PostgreSQL.
    """
    models = [line.partition(":")[2].strip() for line in _cpuinfo() if line.startswith("model name")]
    model = models[0] if models else platform.machine()
    return {
        "processor": f"{len(psutil.Process().cpu_affinity() or models)} cores of {model}",
        "memory": f"{psutil.virtual_memory().total / 2**30:.0f} GiB",
        "disk": _disk(),
        "system": f"{platform.system()} {platform.release()}",
        "Python": platform.python_version(),
        "PostgreSQL": postgres,
        "packages": ", ".join(f"{name} {version(name)}" for name in _PACKAGES),
    }


def _disk() -> str:
    """Measure the disk's sync, for which a COMMIT waits, in the directory of temporary files."""
    took = []
    with tempfile.TemporaryFile(buffering=0) as file:
        for _ in range(201):
            file.seek(0)
            file.write(bytes(8192))
            began = time.perf_counter()
            os.fdatasync(file.fileno())
            took.append(time.perf_counter() - began)
    return f"{statistics.median(took) * 1e6:.0f} µs to sync 8 KiB (median)"


def _cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []
