"""Bytes to values and back: wire formats and the sans-IO state machines of every link."""
