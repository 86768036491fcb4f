"""The entry point of the command line. Ctrl-C ends it with a line, even while its modules are imported."""

from __future__ import annotations

import sys


def run() -> None:
    """Run ``s2s``."""
    try:
        from s2s.cli import main  # noqa: PLC0415 - importing it takes a second

        main()
    except KeyboardInterrupt:
        sys.stderr.write("Aborted!\n")
        sys.exit(130)


if __name__ == "__main__":
    run()
