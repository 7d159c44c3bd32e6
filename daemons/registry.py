"""The registry: which process is which domain, and what the launcher granted to it.

It is this system's xenstore. The launcher writes one NAME.json per domain; every backend reads it
when a peer connects, before the peer's first byte. Deciding what a domain may do is left to
`policy`.

Invariants:
- A record becomes visible whole or not at all (written beside, then renamed).
- A file that is a symlink, belongs to somebody else or is writable by others is never believed.
- A record with an unknown key, a missing key or a value out of range is refused, not repaired.
"""

from __future__ import annotations

import contextlib
import json
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, Final, Protocol
from uuid import UUID

from daemons.errors import OUT_OF_RESOURCES, ExitCode, Failure, NotNow
from daemons.labels import Label
from daemons.places import BadPlace, Places, check_domain_name

RECORD_BYTES_MAX: Final = 64 * 1024
RECORDS_MAX: Final = 4096
VTPMS_MAX: Final = 64
FORMAT: Final = 1
_LOOK_FOR_A_LIMIT: Final = "Look for a limit on descriptors or memory (ulimit -n, fs.file-max)"


class Role(StrEnum):
    """What a domain is in the chain of TPMs."""

    HWTPM = "hwtpm"
    MANAGER = "manager"
    VTPM = "vtpm"
    GUEST = "guest"
    DOMAIN0 = "domain0"


def served_at(places: Places, name: str, role: Role) -> Path:
    """Give the socket at which the chip, a backend or a guest serves."""
    own = places.domain(name)
    sockets = {Role.HWTPM: places.tis_socket, Role.GUEST: own.tpm0}
    return sockets.get(role, own.ring_socket)


class PeerIdentity(Protocol):
    """What the kernel says about a peer; `listeners.PeerCredentials` is one."""

    @property
    def pid(self) -> int:
        """The process that connected."""

    @property
    def uid(self) -> int:
        """Its user."""

    @property
    def start_time(self) -> int | None:
        """Field 22 of /proc/PID/stat in clock ticks; None when the process is gone."""

    @property
    def lack(self) -> str:
        """What was lacking to tell that; empty when nothing was."""
        ...


class UnknownPeer(Failure):
    """A process connected that is no domain of this launcher."""


class DamagedRegistry(Failure):
    """A file of the registry cannot be believed; it was left as it is."""


@dataclass(frozen=True, slots=True, kw_only=True)
class VtpmDevice:
    """One TPM frontend of a domain, as the toolstack set it up."""

    devid: int
    """Number of the device in its domain, from 0."""
    backend: str
    """Name of the domain that serves it."""
    uuid: UUID
    """Who the frontend is, to its backend."""
    handle: int
    """The same number as devid in every known toolstack."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DomainRecord:
    """One domain as it is running now."""

    name: str
    domid: int
    """A new one at every start and reboot, as in Xen."""
    role: Role
    label: str
    """user:role:type"""
    uid: int
    pid: int | None
    """None while no process of the domain runs."""
    start_time: int | None
    """Field 22 of /proc/PID/stat: tells this process from a later one with the same pid."""
    vtpms: tuple[VtpmDevice, ...] = ()
    localities: tuple[int, ...] = ()
    """TIS pages granted by `iomem`."""
    boot_hash: str = ""
    """Hex SHA-1 of the program, measured by the launcher."""


@dataclass(frozen=True, slots=True)
class _Read:
    """A record and the owner of its file."""

    record: DomainRecord
    writer_uid: int


class Registry:
    """Read side of the registry.

    Args:
        directory: Where the records are; need not exist yet.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        # Parsed by content: a record is parsed once, and a change can never be missed as it could
        # be with times of files. Threads may look up at the same time: the worst is parsing twice.
        self._parsed: dict[bytes, DomainRecord] = {}

    def lookup(self, credentials: PeerIdentity) -> DomainRecord:
        """Tell which domain a peer is.

        A domain with a uid of its own is known by that uid. Where all share the launcher's uid
        (a plain user's lab) it is the pid together with the start time.

        Raises:
            UnknownPeer: no domain is this process, or two are.
            DamagedRegistry: the directory cannot be believed.
            NotNow: it cannot be told for now, for want of a descriptor.
        """
        found: list[DomainRecord] = []
        unreadable = 0
        for read in self._read_all():
            # One bad file must not lock out the other domains; its own domain stays unknown.
            if isinstance(read, DamagedRegistry):
                unreadable += 1
            elif _is_same(read.record, credentials, read.writer_uid):
                found.append(read.record)
        if len(found) == 1:
            return found[0]
        if not found and credentials.lack:
            raise NotNow(
                f"cannot tell which domain process {credentials.pid} is",
                why=credentials.lack,
                next_step=_LOOK_FOR_A_LIMIT,
                exit_code=ExitCode.UNAVAILABLE,
            )
        if found:
            why = "more than one domain claims this process: " + ", ".join(r.name for r in found)
        else:
            why = f"the registry {self._directory} has no domain with this process"
            if unreadable:
                why += f", and {unreadable} of its files cannot be believed"
        raise UnknownPeer(
            f"process {credentials.pid} of uid {credentials.uid} is not a domain",
            why=why,
            next_step="Connect from a domain that was made with `vtpm create`",
            exit_code=ExitCode.NO_PERMISSION,
        )

    def get(self, name: str) -> DomainRecord | None:
        """Give the record of a domain, or None when there is none.

        Raises:
            DamagedRegistry: the record is there but cannot be believed.
            BadPlace: the name is not a domain name.
        """
        check_domain_name(name)
        for read in self._read_all(only=name):
            if isinstance(read, DamagedRegistry):
                raise read
            return read.record
        return None

    def all(self) -> list[DomainRecord]:
        """Give all records in the order of their domids.

        Raises:
            DamagedRegistry: one of them cannot be believed.
        """
        records: list[DomainRecord] = []
        for read in self._read_all():
            if isinstance(read, DamagedRegistry):
                raise read
            records.append(read.record)
        return sorted(records, key=lambda record: record.domid)

    def _parse(self, content: bytes) -> DomainRecord:
        record = self._parsed.get(content)
        if record is None:
            record = decode_record(content)
            if len(self._parsed) >= RECORDS_MAX:
                self._parsed = {}
            self._parsed[content] = record
        return record

    def _read_all(self, only: str | None = None) -> Iterator[_Read | DamagedRegistry]:
        """Yield what each record file holds, or why it cannot be believed."""
        try:
            directory = os.open(
                self._directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
            )
        except FileNotFoundError:
            return
        except OSError as error:
            raise _unread(self._directory, error) from error
        try:
            _check_owner(os.fstat(directory), self._directory)
            # A descriptor, not a path: the directory cannot be swapped between check and reading.
            listed = self._listed(directory) if only is None else [f"{only}.json"]
            names = [name for name in listed if name.endswith(".json") and not name.startswith(".")]
            if len(names) > RECORDS_MAX:
                raise _damaged(
                    self._directory, f"it has {len(names)} records, more than {RECORDS_MAX}"
                )
            for name in names:
                try:
                    yield self._read(directory, name)
                except FileNotFoundError:
                    continue  # removed since it was listed
                except DamagedRegistry as error:
                    yield error
        finally:
            os.close(directory)

    def _listed(self, directory: int) -> list[str]:
        try:
            return os.listdir(directory)
        except OSError as error:
            raise _unread(self._directory, error) from error

    def _read(self, directory: int, name: str) -> _Read:
        path = self._directory / name
        try:
            # O_NONBLOCK: a FIFO planted here must not hold us up.
            descriptor = os.open(
                name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=directory
            )
        except FileNotFoundError:
            raise
        except OSError as error:
            raise _unread(path, error, "it cannot be opened ({})") from error
        try:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise _damaged(path, "it is not a regular file")
            # 0 links: it was replaced after we opened it, and is still the record it was.
            if status.st_nlink > 1:
                raise _damaged(path, "it has a second name (a hard link)")
            _check_owner(status, path)
            content = os.read(descriptor, RECORD_BYTES_MAX + 1)
        except OSError as error:
            raise _damaged(path, f"it cannot be read ({os.strerror(error.errno or 0)})") from error
        finally:
            os.close(descriptor)
        if len(content) > RECORD_BYTES_MAX:
            raise _damaged(path, f"it has more than {RECORD_BYTES_MAX} bytes")
        try:
            record = self._parse(content)
        except DamagedRegistry as error:
            raise _damaged(path, error.why) from error
        if f"{record.name}.json" != name:
            raise _damaged(path, f"it says that it is the record of {record.name}")
        return _Read(record, status.st_uid)


class RegistryWriter:
    """Write side of the registry: the launcher's alone.

    Args:
        directory: An existing directory of mode 0700 (see `Places.prepare`), or of root's and a
            group that may read it.
        readers: The id of that group, when readers have other users than the writer; else None.
    """

    def __init__(self, directory: Path, readers: int | None = None) -> None:
        self._directory = directory
        self._readers = readers

    def put(self, record: DomainRecord) -> None:
        """Write a record, or replace the one of the same name, in one step.

        Raises:
            DamagedRegistry: a reader would not believe the record.
            Failure: it cannot be written.
        """
        content = encode_record(record)
        if decode_record(content) != record:
            raise ValueError(f"the record of {record.name} does not survive writing: {record}")
        directory = self._open()
        name, written_beside = f"{record.name}.json", f".{record.name}.json.new"
        try:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(
                    written_beside, dir_fd=directory
                )  # left by a launcher that was killed here
            descriptor = os.open(
                written_beside,
                os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC,
                mode=0o600,
                dir_fd=directory,
            )
            with os.fdopen(descriptor, "wb") as file:
                if self._readers is not None:
                    os.fchown(descriptor, -1, self._readers)
                    os.fchmod(descriptor, 0o640)
                file.write(content)
            # No sync: the run directory does not outlive the machine's power cycle.
            os.rename(written_beside, name, src_dir_fd=directory, dst_dir_fd=directory)
        except OSError as error:
            raise Failure(
                f"cannot write the record of {record.name}",
                why=f"{self._directory / name}: {os.strerror(error.errno or 0)}",
                next_step="Make room on its file system, and look at its owner and mode",
                exit_code=ExitCode.IO_ERROR,
            ) from error
        finally:
            os.close(directory)

    def remove(self, name: str) -> None:
        """Remove a domain's record; nothing happens when there is none."""
        check_domain_name(name)
        directory = self._open()
        try:
            os.unlink(f"{name}.json", dir_fd=directory)
        except FileNotFoundError:
            pass
        except OSError as error:
            raise _damaged(
                self._directory / f"{name}.json", os.strerror(error.errno or 0)
            ) from error
        finally:
            os.close(directory)

    def _open(self) -> int:
        try:
            directory = os.open(
                self._directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
            )
        except OSError as error:
            raise _damaged(self._directory, os.strerror(error.errno or 0)) from error
        try:
            _check_owner(os.fstat(directory), self._directory)
        except DamagedRegistry:
            os.close(directory)
            raise
        return directory


def encode_record(record: DomainRecord) -> bytes:
    """Write a record as JSON, keys sorted, one line per key so that a person can read it."""
    shape = {
        "format": FORMAT,
        "name": record.name,
        "domid": record.domid,
        "role": record.role.value,
        "label": record.label,
        "uid": record.uid,
        "pid": record.pid,
        "start_time": record.start_time,
        "vtpms": [
            {
                "devid": device.devid,
                "backend": device.backend,
                "uuid": str(device.uuid),
                "handle": device.handle,
            }
            for device in record.vtpms
        ],
        "localities": list(record.localities),
        "boot_hash": record.boot_hash,
    }
    return json.dumps(shape, indent=1, sort_keys=True).encode("ascii") + b"\n"


def decode_record(content: bytes) -> DomainRecord:
    """Read a record, strictly.

    Raises:
        DamagedRegistry: not JSON, an unknown, missing or repeated key, a value out of range.
    """
    try:
        fields = _Fields(json.loads(content, object_pairs_hook=_without_repeats))
        if fields.integer("format", 1, 1 << 31) != FORMAT:
            raise _WrongRecordError("this version reads format 1 only")
        record = DomainRecord(
            name=check_domain_name(fields.text("name")),
            domid=fields.integer("domid", 0, 0x7FEF),
            role=Role(fields.text("role")),
            label=str(Label.parse(fields.text("label"))),
            uid=fields.integer("uid", 0, 0xFFFFFFFE),
            pid=fields.optional_integer("pid", 1, 1 << 22),
            start_time=fields.optional_integer("start_time", 0, 1 << 63),
            vtpms=tuple(_decode_device(entry) for entry in fields.sequence("vtpms", VTPMS_MAX)),
            localities=tuple(_locality(entry) for entry in fields.sequence("localities", 5)),
            boot_hash=_hex_digest(fields.text("boot_hash")),
        )
        fields.finish()
    except (ValueError, RecursionError, BadPlace) as error:
        # JSONDecodeError, UnicodeDecodeError, LabelError and _WrongRecordError are ValueErrors.
        reason = error.why if isinstance(error, BadPlace) else str(error)
        raise _damaged(None, reason) from error
    return record


class _WrongRecordError(ValueError):
    """A value that is not what the format says."""


class _Fields:
    """Takes the keys of one JSON object and complains about those that are left."""

    def __init__(self, parsed: object) -> None:
        if not isinstance(parsed, dict):
            raise _WrongRecordError("a record is a JSON object")
        self._left: dict[str, Any] = dict(parsed)

    def _take(self, key: str) -> object:
        if key not in self._left:
            raise _WrongRecordError(f"the key {key} is missing")
        return self._left.pop(key)

    def text(self, key: str) -> str:
        value = self._take(key)
        if not isinstance(value, str):
            raise _WrongRecordError(f"{key} is not a text")
        return value

    def integer(self, key: str, least: int, most: int) -> int:
        return _integer(self._take(key), key, least, most)

    def optional_integer(self, key: str, least: int, most: int) -> int | None:
        value = self._take(key)
        return None if value is None else _integer(value, key, least, most)

    def sequence(self, key: str, count_max: int) -> list[object]:
        value = self._take(key)
        if not isinstance(value, list) or len(value) > count_max:
            raise _WrongRecordError(f"{key} is not a list of {count_max} entries at most")
        return value

    def finish(self) -> None:
        if self._left:
            raise _WrongRecordError(
                "unknown keys: " + ", ".join(sorted(map(ascii, self._left))[:5])
            )


def _integer(value: object, key: str, least: int, most: int) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
        raise _WrongRecordError(f"{key} is not a number from {least} to {most}")
    return value


def _locality(value: object) -> int:
    return _integer(value, "a locality", 0, 4)


def _hex_digest(text: str) -> str:
    if text and (len(text) != 40 or not set(text) <= set("0123456789abcdef")):
        raise _WrongRecordError("boot_hash is neither empty nor 40 lower-case hex digits")
    return text


def _decode_device(parsed: object) -> VtpmDevice:
    fields = _Fields(parsed)
    text = fields.text("uuid")
    uuid = UUID(text)
    if str(uuid) != text:
        raise _WrongRecordError(f"{text!a} is not a uuid in lower-case 8-4-4-4-12 form")
    device = VtpmDevice(
        devid=fields.integer("devid", 0, 0xFFFF),
        backend=check_domain_name(fields.text("backend")),
        uuid=uuid,
        handle=fields.integer("handle", 0, 0xFFFF),
    )
    fields.finish()
    return device


def _without_repeats(pairs: list[tuple[str, object]]) -> dict[str, object]:
    shape = dict(pairs)
    if len(shape) != len(pairs):
        raise _WrongRecordError("a key appears twice")
    return shape


def _is_same(record: DomainRecord, peer: PeerIdentity, launcher_uid: int) -> bool:
    """Tell whether a peer is this domain; the record's file belongs to the launcher."""
    if record.uid != peer.uid:
        return False
    if record.uid != launcher_uid:
        return True
    # None never matches: a process that is gone, or a domain that does not run, is nobody.
    return (
        record.pid is not None
        and record.start_time is not None
        and (record.pid, record.start_time) == (peer.pid, peer.start_time)
    )


def _check_owner(status: os.stat_result, path: Path) -> None:
    if status.st_uid not in {0, os.geteuid()}:
        raise _damaged(
            path, f"it belongs to uid {status.st_uid}, not to root or uid {os.geteuid()}"
        )
    if status.st_mode & 0o022:
        raise _damaged(path, f"its mode {stat.S_IMODE(status.st_mode):04o} lets others write to it")


def _unread(path: Path, error: OSError, why: str = "{}") -> Failure:
    """What to raise of a file that cannot be opened: it may be us who lack something."""
    reason = os.strerror(error.errno or 0)
    if error.errno not in OUT_OF_RESOURCES:
        return _damaged(path, why.format(reason))
    return NotNow(
        f"cannot look into the registry entry {path}",
        why=reason,
        next_step=_LOOK_FOR_A_LIMIT,
        exit_code=ExitCode.UNAVAILABLE,
    )


def _damaged(path: Path | None, why: str) -> DamagedRegistry:
    return DamagedRegistry(
        f"the registry entry {path} is refused" if path else "a registry record is refused",
        why=why,
        next_step="Stop the stack with `vtpm down` and start it again; where there is no launcher"
        " any more, end that domain's process and remove the file: vtpm doctor names both",
        exit_code=ExitCode.DAMAGED,
    )
