"""Measurements against swtpm."""
