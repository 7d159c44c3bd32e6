"""`systemctl reload` of a daemon: it logs as etc/vtpm/log-levels.toml says now.

Run by the unit (ExecReload=) as the daemon's own user. A file that is wrong makes the reload fail,
with its reason, and the daemon never hears of it.
"""

from __future__ import annotations

import os
import signal

from daemons.log_levels import read_levels
from daemons.places import Places


def reload(places: Places, daemon_pid: int) -> None:
    """Check the file, and tell the daemon.

    Args:
        places: Of the installation.
        daemon_pid: What systemd calls MAINPID.

    Raises:
        Failure: The file is wrong.
    """
    read_levels(places.log_levels)
    os.kill(daemon_pid, signal.SIGHUP)
