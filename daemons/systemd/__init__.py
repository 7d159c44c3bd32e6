"""The stack under systemd: what the units need beside the daemons, and how to ask systemd."""
