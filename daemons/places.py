"""Where everything of one installation lives: every path is made here, under one root.

Invariants:
- Two different roots never share a path. A path of a config file cannot leave its root.
- What runs, is stored or is logged sits in directories that only this user or root can read or
  write. They are made with mode 0700; where each domain has a user of its own, they may let others
  through to sockets, whose own modes then say who gets in (mode 0711).
- A domain's name is checked before it becomes part of a path.

What the files hold is left to their owners; socket paths too long for the system, to `listeners`.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Final

from daemons.errors import ExitCode, Failure

DOMAIN_NAME_CHARACTERS_MAX: Final = 64

CHIP_NAME: Final = "hwtpm"
DOMAIN0_NAME: Final = "Domain-0"
LAUNCHER_NAME: Final = "launcher"
"""Of its log, and in plans of faults and log-levels.toml: no domain, but named like one."""
TAKEN_NAMES: Final = frozenset({"registry", "launcher.sock", "notify.sock", "event.log", "powered"})
"""Entries of run/vtpm that are not directories of domains."""
RESERVED_NAMES: Final = TAKEN_NAMES | {CHIP_NAME, DOMAIN0_NAME, LAUNCHER_NAME}
"""Names that a config file may not choose."""


class BadPlace(Failure):
    """A path, a directory or a domain name that is not safe to use."""

    def __init__(self, what: str, *, why: str, next_step: str) -> None:
        super().__init__(what, why=why, next_step=next_step, exit_code=ExitCode.CONFIGURATION)


def check_domain_name(name: str) -> str:
    """Check that a domain name is safe in paths, listings and logs.

    Args:
        name: 1 to 64 printable ASCII characters without blanks and slashes, not made of digits only
            (that would read as a domid), not starting with `.` or `-`.

    Returns:
        The name, unchanged.

    Raises:
        BadPlace: the name breaks one of these rules; the message shows it escaped.
    """
    reason = None
    if not 0 < len(name) <= DOMAIN_NAME_CHARACTERS_MAX:
        reason = f"it has {len(name)} characters; 1 to {DOMAIN_NAME_CHARACTERS_MAX} are allowed"
    elif not all("!" <= character <= "~" and character != "/" for character in name):
        reason = "only printable ASCII characters without blanks and slashes are allowed"
    elif name[0] in ".-":
        reason = f"it starts with {name[0]!r}"
    elif name.isdigit():
        reason = "it has digits only and would be taken for a domid"
    elif name in TAKEN_NAMES:
        reason = "the stack itself uses this name in its run directory"
    if reason is not None:
        shown = ascii(name if len(name) <= DOMAIN_NAME_CHARACTERS_MAX else name[:32] + "...")
        raise BadPlace(
            f"{shown} cannot be the name of a domain",
            why=reason,
            next_step="Choose a name such as guest1",
        )
    return name


@dataclass(frozen=True, slots=True)
class DomainPlaces:
    """The places of one domain; the chip has them too, under the name `hwtpm`."""

    directory: Path
    log: Path

    @property
    def ring_socket(self) -> Path:
        """The socket on which a backend (the manager or a vTPM) takes rings."""
        return self.directory / "ring.sock"

    @property
    def tpm0(self) -> Path:
        """The guest's TPM device: a stream socket of raw TPM commands."""
        return self.directory / "tpm0"

    @property
    def journal(self) -> Path:
        """Volatile state and last response, which survive a killed process."""
        return self.directory / "journal"

    @property
    def requests(self) -> Path:
        """What the manager must not do twice, which survives a killed manager."""
        return self.directory / "requests"

    @property
    def config(self) -> Path:
        """The xl config file as it was when the domain was created."""
        return self.directory / "domain.cfg"


def _resolved(root: Path) -> Path:
    """The root without symlinks and dots.

    Raises:
        BadPlace: It has no end, or is no text: config files and logs name what is below it.
    """
    try:
        str(root).encode()
        return root.resolve()
    except (OSError, RuntimeError, UnicodeEncodeError) as error:
        why = "its path is not UTF-8" if isinstance(error, UnicodeEncodeError) else str(error)
        raise BadPlace("the root cannot be used", why=why, next_step="Give a plain path") from error


@dataclass(frozen=True, slots=True)
class Places:
    """All paths of one installation.

    Args:
        root: An absolute directory; `/` for an installed system.
    """

    root: Path

    def __post_init__(self) -> None:
        if not self.root.is_absolute():
            raise BadPlace(
                f"the root {str(self.root)!r} cannot be used",
                why="it is not an absolute path",
                next_step="Give a path that starts with /",
            )

    @classmethod
    def choose(
        cls, root_option: str | None, environ: Mapping[str, str], *, uid: int | None = None
    ) -> Places:
        """Choose the root: the option, else VTPM_ROOT, else `/` for root, a directory for others.

        Args:
            root_option: What `--root` was given, or None.
            environ: The process's environment.
            uid: Effective user id; the process's own when None.

        Raises:
            BadPlace: a plain user without HOME, or a root that cannot be a path.
        """
        chosen = root_option or environ.get("VTPM_ROOT")
        if chosen:
            if "\0" in chosen:
                raise BadPlace(
                    "the root cannot be used", why="it holds a NUL", next_step="Give a plain path"
                )
            return cls(_resolved(Path(chosen)))
        if (os.geteuid() if uid is None else uid) == 0:
            return cls(Path("/"))
        # The XDG Base Directory Specification says that a relative value is to be ignored.
        state_home = environ.get("XDG_STATE_HOME", "")
        if state_home.startswith("/"):
            return cls(_resolved(Path(state_home) / "vtpm"))
        home = environ.get("HOME", "")
        if not home.startswith("/"):
            raise BadPlace(
                "there is no place for the stack's files",
                why="neither --root, VTPM_ROOT, XDG_STATE_HOME nor HOME names a directory",
                next_step="Give one with --root DIR",
            )
        return cls(_resolved(Path(home) / ".local" / "state" / "vtpm"))

    @property
    def run(self) -> Path:
        """Sockets, the registry and journals: gone after a power cycle of the machine."""
        return self.root / "run" / "vtpm"

    @property
    def state(self) -> Path:
        """What must survive the machine's power cycle, apart from the domains' images."""
        return self.root / "var" / "lib" / "vtpm"

    @property
    def config(self) -> Path:
        """Settings and policy; the administrator's, never written by the stack."""
        return self.root / "etc" / "vtpm"

    @property
    def log_dir(self) -> Path:
        """One log file per domain."""
        return self.root / "var" / "log" / "vtpm"

    @property
    def launcher_socket(self) -> Path:
        """The launcher's control socket."""
        return self.run / "launcher.sock"

    @property
    def notify_socket(self) -> Path:
        """Where the launcher's children report readiness (sd_notify)."""
        return self.run / "notify.sock"

    @property
    def tis_socket(self) -> Path:
        """Register accesses to the chip."""
        return self.run / CHIP_NAME / "tis.sock"

    @property
    def chip_memory(self) -> Path:
        """The chip's own non-volatile memory."""
        return self.state / "hwtpm.nv"

    @property
    def registry(self) -> Path:
        """One NAME.json per domain, written by the launcher."""
        return self.run / "registry"

    @property
    def event_log(self) -> Path:
        """The TCG event log of the platform's last power-on."""
        return self.run / "event.log"

    @property
    def log_levels(self) -> Path:
        """How much each process logs; need not exist, and may change while they run."""
        return self.config / "log-levels.toml"

    @property
    def policy(self) -> Path:
        """Who may talk to whom; need not exist."""
        return self.config / "policy.toml"

    @property
    def domains(self) -> Path:
        """The domains that systemd starts: an xl config file each, NAME.cfg."""
        return self.config / "domains"

    def settings(self, daemon: str) -> Path:
        """Give the settings file of one daemon; it need not exist."""
        return self.config / f"{daemon}.toml"

    def domain(self, name: str) -> DomainPlaces:
        """Give the places of a domain.

        Raises:
            BadPlace: the name is not a domain name.
        """
        check_domain_name(name)
        return DomainPlaces(directory=self.run / name, log=self.log_dir / f"{name}.log")

    def under_root(self, path: str | PurePosixPath) -> Path:
        """Take an absolute path of a config file under the root.

        Raises:
            BadPlace: the path is relative, has a `..` part (it could leave the root) or a NUL.
        """
        plain = PurePosixPath(path)
        reason = None
        if not plain.is_absolute():
            reason = "it is not absolute"
        elif ".." in plain.parts:
            reason = "it has a .. part and could leave the root"
        elif "\0" in str(plain):
            reason = "it holds a NUL"
        if reason is not None:
            raise BadPlace(
                f"the path {str(path)!a} cannot be used",
                why=reason,
                next_step=f"Give an absolute path; it is taken under {self.root}",
            )
        return self.root.joinpath(*plain.parts[1:])

    def images(self, path_in_config: str | PurePosixPath) -> Path:
        """Give the real file of a disk image named in a config file; see `under_root`."""
        return self.under_root(path_in_config)

    def prepare(self) -> None:
        """Make the run, state and log directories, or check those that are there.

        Raises:
            BadPlace: one of them is a symlink, belongs to somebody else, or is open to others.
        """
        for directory in (self.run, self.state, self.log_dir, self.registry):
            self.make_private(directory)

    def make_private(self, directory: Path) -> None:
        """Make a directory under run, state or log with mode 0700, or check the one that is there.

        Every step is taken relative to the directory opened before it, so nobody can slip a
        symlink in between.

        Raises:
            BadPlace: a part of the path is a symlink or not a directory, belongs to somebody
                else, or the private part is open to others.
            ValueError: the directory is not one of the private ones (our bug).
        """
        private = next(
            (top for top in (self.run, self.state, self.log_dir) if directory.is_relative_to(top)),
            None,
        )
        if private is None:
            raise ValueError(f"{directory} is not under run, state or log")
        here = self._open_root()
        try:
            path = self.root
            for part in directory.relative_to(self.root).parts:
                path /= part
                below = _step_into(here, path, is_private=path.is_relative_to(private))
                os.close(here)
                here = below
        finally:
            os.close(here)

    def _open_root(self) -> int:
        try:
            self.root.mkdir(mode=0o700, parents=True, exist_ok=True)
            descriptor = os.open(self.root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as error:
            raise _cannot_make(self.root, error) from error
        try:
            _check_directory(descriptor, self.root, is_private=False)
        except BadPlace:
            os.close(descriptor)
            raise
        return descriptor


def inspect_directory(directory: Path, *, is_private: bool) -> bool:
    """Look at a directory as `Places.prepare` does, without making it.

    Returns:
        Whether it is there.

    Raises:
        BadPlace: It would not be used.
        PermissionError: A directory above it, somebody else's, does not let us through.
    """
    try:
        descriptor = os.open(
            directory, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC | (is_private and os.O_NOFOLLOW)
        )
    except FileNotFoundError:
        return False
    except PermissionError:
        raise
    except OSError as error:
        why = "it is a symlink or not a directory" if error.errno == errno.ENOTDIR else None
        raise _cannot_make(directory, error, why) from error
    try:
        _check_directory(descriptor, directory, is_private=is_private)
        is_ours = os.fstat(descriptor).st_uid == os.geteuid()
        if is_ours and not os.access(directory, os.R_OK | os.W_OK | os.X_OK, effective_ids=True):
            raise _cannot_make(directory, PermissionError(errno.EACCES, "Permission denied"))
    finally:
        os.close(descriptor)
    return True


def _step_into(parent: int, path: Path, *, is_private: bool) -> int:
    """Open a directory below `parent`, after making it when it is not there."""
    try:
        # Made with its final mode whatever the umask is: 0700 has no bits that a sane umask clears.
        os.mkdir(path.name, mode=0o700, dir_fd=parent)
    except FileExistsError:
        pass
    except OSError as error:
        raise _cannot_make(path, error) from error
    # An installed system's /var/lib may be a symlink of its administrator; ours may not be one.
    follow = (
        0 if path.parts[:2] in {("/", "run"), ("/", "var")} and not is_private else os.O_NOFOLLOW
    )
    try:
        # O_PATH: one that only lets us through is not for reading.
        descriptor = os.open(
            path.name, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC | follow, dir_fd=parent
        )
    except OSError as error:
        # A symlink gives ENOTDIR here, because O_DIRECTORY looks at the link itself.
        why = (
            "it is a symlink or not a directory"
            if error.errno in {errno.ELOOP, errno.ENOTDIR}
            else None
        )
        raise _cannot_make(path, error, why) from error
    try:
        _check_directory(descriptor, path, is_private=is_private)
    except BadPlace:
        os.close(descriptor)
        raise
    return descriptor


def _check_directory(descriptor: int, path: Path, *, is_private: bool) -> None:
    status = os.fstat(descriptor)
    mode = stat.S_IMODE(status.st_mode)
    if status.st_uid not in {0, os.geteuid()}:
        raise BadPlace(
            f"the directory {path} cannot be used",
            why=f"it belongs to uid {status.st_uid}, not to uid {os.geteuid()} or root",
            next_step="Remove it, or choose another root with --root",
        )
    if is_private and mode & 0o066:
        raise BadPlace(
            f"the directory {path} cannot be used",
            why=f"its mode is {mode:04o}, so other users could get in",
            next_step=f"Run: chmod 700 {path}",
        )
    if mode & stat.S_IWOTH and not mode & stat.S_ISVTX:
        raise BadPlace(
            f"the directory {path} cannot be used",
            why=f"its mode is {mode:04o}, so everybody may rename what is in it",
            next_step=f"Run: chmod o-w {path}",
        )


def _cannot_make(path: Path, error: OSError, why: str | None = None) -> BadPlace:
    return BadPlace(
        f"the directory {path} cannot be used",
        why=why or os.strerror(error.errno or 0),
        next_step="Remove what is there, fix its owner, or choose another root with --root",
    )
