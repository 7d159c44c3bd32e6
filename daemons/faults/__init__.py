"""Faults on purpose: what a plan may say, and how it reaches the daemons."""
