"""The operators' operations, declared once, and served over HTTP."""
