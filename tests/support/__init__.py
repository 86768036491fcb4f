"""Helpers of several test modules: databases, role processes, peers, proxies and polling."""
