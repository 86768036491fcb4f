"""The link and the durable push beside what else there is, on one machine and in one run (docs/performance.rst)."""
