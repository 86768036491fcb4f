"""The process and its operating system: clock, threads, files, streams, signals and the log."""
