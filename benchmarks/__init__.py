"""The benchmark of the link and the durable push beside comparable systems, in one run (docs/performance.rst)."""
