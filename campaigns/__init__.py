"""Long tests with real processes: faults, floods, the HTTP API under generated requests, and the benchmark."""
