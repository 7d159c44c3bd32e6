"""A domain's user and its directory in run/vtpm, made before its socket is.

The user's name follows from the domain's, and systemd-sysusers keeps its number: the files that a
domain leaves are still its own after the next boot.
"""

from __future__ import annotations

import os
import pwd
import stat
import subprocess
from pathlib import Path
from typing import Final

from daemons.errors import ExitCode, Failure
from daemons.places import CHIP_NAME, Places
from daemons.systemd.domain_files import MANAGER_NAME, check_name, user_of
from daemons.systemd.registering import uid_of
from daemons.systemd.run_state import READERS_GROUP

DIRECTORY_MODE: Final = 0o711
"""Others get through to the sockets, which have modes of their own; they see nothing else."""


def set_up(places: Places, name: str) -> None:
    """Make the user and the run directory of a domain, unless they are there.

    Raises:
        Failure: The name does not fit, or systemd-sysusers failed.
    """
    check_name(name)
    user = user_of(name)
    lines = f'u {user} - "vTPM domain {name}" /\nm {user} {READERS_GROUP}\n'
    made = subprocess.run(["systemd-sysusers", "-"], input=lines, text=True, check=False)  # noqa: S607 - root's PATH is systemd's
    if made.returncode:
        raise Failure(
            f"cannot make the user {user}",
            why=f"systemd-sysusers ended with status {made.returncode}",
            next_step="Look at what it says above",
            exit_code=ExitCode.IO_ERROR,
        )
    _give_run_directory(places, name)


def set_up_daemons(places: Places) -> None:
    """Make the run directories of the chip and the manager, whose users are there.

    systemd-tmpfiles makes them at each boot. Right after installing it runs in a sandbox, and gives
    a directory away before it sets its mode.

    Raises:
        Failure: Something else stands there, or a user is missing.
    """
    places.run.mkdir(mode=DIRECTORY_MODE, exist_ok=True)
    places.run.chmod(DIRECTORY_MODE)
    for name in (CHIP_NAME, MANAGER_NAME):
        _give_run_directory(places, name)


def _give_run_directory(places: Places, name: str) -> None:
    uid = uid_of(name)
    give_directory(places.domain(name).directory, uid, pwd.getpwuid(uid).pw_gid)


def give_directory(directory: Path, uid: int, gid: int) -> None:
    """Make a domain's run directory; the one above it is root's, so nobody is in between.

    Raises:
        Failure: Something else stands there.
    """
    directory.mkdir(mode=0o700, exist_ok=True)
    try:
        # Not to read it: what is somebody else's, root may not read without CAP_DAC_READ_SEARCH.
        descriptor = os.open(directory, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError as error:
        raise Failure(
            f"cannot use {directory}",
            why=error.strerror or str(error),
            next_step="Look at what it is, and move it away",
            exit_code=ExitCode.IO_ERROR,
        ) from error
    try:
        status, itself = os.fstat(descriptor), Path(f"/proc/self/fd/{descriptor}")
        # In this order, and only what is needed: it is then done without CAP_FOWNER.
        if stat.S_IMODE(status.st_mode) != DIRECTORY_MODE:
            itself.chmod(DIRECTORY_MODE)
        if status.st_uid != uid:
            os.chown(itself, uid, gid)
    finally:
        os.close(descriptor)
