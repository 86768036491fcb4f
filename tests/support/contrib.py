"""A PostgreSQL of the operating system with its contributed extensions, which the embedded PostgreSQL lacks."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from dataclasses import replace
from pathlib import Path
from unittest import TestCase

from s2s.store.embedded import postmaster


def start(test: TestCase, extension: str) -> str:
    """Start a PostgreSQL that has an extension, until the end of a test; skip the test if none is installed.

    :returns: the URL of its database ``postgres``.
    """
    programs = next(
        (
            Path(found["BINDIR"])
            for each in ("pg_config", *sorted(map(str, Path("/usr/lib/postgresql").glob("*/bin/pg_config"))))
            if (found := _config(each))
            and (Path(found["SHAREDIR"]) / f"extension/{extension}.control").exists()
            and (Path(found["BINDIR"]) / "postgres").exists()
        ),
        None,
    )
    if programs is None:
        test.skipTest(f"no PostgreSQL of the operating system has the extension {extension}")
    version = int((subprocess.check_output([programs / "postgres", "--version"], text=True).split()[2]).split(".")[0])
    directory = tempfile.mkdtemp(prefix="s2s-contrib-")
    test.addCleanup(shutil.rmtree, directory, ignore_errors=True)
    data = Path(directory) / "postgres"
    find_install = postmaster._find_install
    install = replace(find_install(), programs=programs, version=version)
    postmaster._find_install = lambda: install
    try:
        url, _ = postmaster.start(data)
    finally:
        postmaster._find_install = find_install
    test.addCleanup(postmaster.stop, data)
    return url


def _config(program: str) -> dict[str, str]:
    """Return what ``pg_config`` prints; empty: there is none."""
    try:
        printed = subprocess.check_output([program], text=True, stderr=subprocess.DEVNULL)
    except (OSError, subprocess.SubprocessError):
        return {}
    return dict(line.split(" = ", 1) for line in printed.splitlines() if " = " in line)
