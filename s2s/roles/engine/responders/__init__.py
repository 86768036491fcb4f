"""The responders of an engine, with one module for each message or pair of messages."""
