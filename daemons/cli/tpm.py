"""`vtpm tpm GUEST COMMAND`: the common TPM commands from the shell.

GUEST is a guest of this installation, or the path of any TPM 1.2 socket (a simulator's, say).
Secrets are `well-known` (20 zero bytes, the default), `text:WORDS` (their SHA-1) or `hash:HEX`.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer

from daemons.cli.guests import tpm0_of
from daemons.cli.options import Json, Root, new_app
from daemons.cli.output import print_json, print_line
from daemons.errors import ExitCode, Failure
from daemons.named_files import read_bytes, write_private

if TYPE_CHECKING:
    from protocol.return_codes import ReturnCode
    from tpm12.client import TpmClient

_FORMS: Final = "well-known, text:WORDS or hash:HEX."
OwnerAuth = Annotated[str, typer.Option("--owner-auth", metavar="SECRET", help=_FORMS)]
Auth = Annotated[str, typer.Option("--auth", metavar="SECRET", help=_FORMS)]
Index = Annotated[str, typer.Argument(metavar="INDEX", help="As 0x11101 or decimal.")]
Pcr = Annotated[int, typer.Argument(min=0, max=23)]
Size = Annotated[int, typer.Argument(metavar="BYTES", min=0, max=0xFFFF)]
WELL_KNOWN: Final = "well-known"
_CMD_ENABLE, _NOTPRESENT, _PRESENT = 0x0020, 0x0010, 0x0008  # Part 2 §4.9
_FILE_BYTES_MAX: Final = 256 * 1024 * 1024
_NV_INDEX_MAX: Final = 0xFFFFFFFF
_PUBLIC_OWNER_RIGHTS: Final = 0x00020002  # OWNERREAD and OWNERWRITE


app = new_app(name="tpm", help="A guest's TPM: common commands.")


class Presence(StrEnum):
    """Whether a person is at the platform."""

    ON = "on"
    OFF = "off"


@app.callback()
def select(
    context: typer.Context,
    guest: Annotated[str, typer.Argument(metavar="GUEST", help="A guest, or a socket's path.")],
    root: Root = None,
) -> None:
    """Send a command to a guest's TPM."""
    context.obj = (guest, root)


@app.command()
def version(context: typer.Context, *, as_json: Json = False) -> None:
    """Show maker, version and limits."""
    from protocol.constants import CapabilityArea, CapabilityProperty  # noqa: PLC0415
    from protocol.structures import CapVersionInfo  # noqa: PLC0415
    from protocol.wire import decode  # noqa: PLC0415

    with _tpm(context) as tpm:
        info = decode(CapVersionInfo, tpm.get_capability(CapabilityArea.VERSION_VAL))
        found = {
            "vendor": info.tpm_vendor_id.decode("ascii", "replace"),
            "version": ".".join(map(str, info.version)),
            "spec_level": info.spec_level,
            "errata_revision": info.errata_rev,
            "pcrs": _number(tpm, CapabilityProperty.PCR),
            "free_key_slots": _number(tpm, CapabilityProperty.KEYS),
            "has_owner": bool(_number(tpm, CapabilityProperty.OWNER)),
        }
    _show(found, as_json=as_json)


@app.command()
def selftest(context: typer.Context) -> None:
    """Let the TPM test itself."""
    from protocol.constants import Ordinal  # noqa: PLC0415

    with _tpm(context) as tpm:
        tpm.call(Ordinal.SELF_TEST_FULL)
        print_line(tpm.call(Ordinal.GET_TEST_RESULT).out_data.decode("ascii", "replace").strip())


@app.command()
def pcr_read(
    context: typer.Context,
    indices: Annotated[list[int] | None, typer.Argument(metavar="[PCR...]", min=0, max=23)] = None,
    *,
    as_json: Json = False,
) -> None:
    """Show PCR values; all of them if none is named."""
    with _tpm(context) as tpm:
        values = {i: tpm.pcr_read(i).hex() for i in indices or range(24)}
    _show({str(i): value for i, value in values.items()}, as_json=as_json)


@app.command()
def extend(
    context: typer.Context,
    pcr: Pcr,
    digest: Annotated[str | None, typer.Argument(metavar="[HEX]")] = None,
    file: Annotated[Path | None, typer.Option(help="Extend with this file's SHA-1.")] = None,
) -> None:
    """Extend a PCR with a digest, or with that of a file."""
    if (digest is None) == (file is None):
        raise typer.BadParameter("give a digest of 40 hex digits, or --file")
    measured = _hex(digest, 20) if digest is not None else _sha1_of(file)
    with _tpm(context) as tpm:
        print_line(tpm.extend(pcr, measured).hex())


@app.command()
def random(context: typer.Context, count: Size) -> None:
    """Print random bytes of the TPM in hex."""
    from tpm12.client_core import BadResponseError  # noqa: PLC0415 - slow to import

    drawn = b""
    with _tpm(context) as tpm:
        while len(drawn) < count:  # a TPM gives what fits into one answer
            more = tpm.get_random(count - len(drawn))
            if not more:
                raise BadResponseError("TPM_GetRandom: no byte of those that were asked for")
            drawn += more
    print_line(drawn.hex())


@app.command()
def ticks(context: typer.Context, *, as_json: Json = False) -> None:
    """Show the ticks since the TPM was switched on, and how long one is."""
    from protocol.constants import Ordinal  # noqa: PLC0415

    with _tpm(context) as tpm:
        now = tpm.call(Ordinal.GET_TICKS).current_time
    found = {
        "ticks": now.current_ticks,
        "microseconds_a_tick": now.tick_rate,
        "nonce": now.tick_nonce.hex(),
    }
    _show(found, as_json=as_json)


@app.command()
def takeownership(
    context: typer.Context, owner_auth: OwnerAuth = WELL_KNOWN, srk_auth: Auth = WELL_KNOWN
) -> None:
    """Install an owner; --auth is the storage root key's secret."""
    with _tpm(context) as tpm:
        tpm.take_ownership(_secret(owner_auth), _secret(srk_auth))


@app.command()
def clear(context: typer.Context, owner_auth: OwnerAuth = WELL_KNOWN) -> None:
    """Remove the owner and everything that hangs on it."""
    with _tpm(context) as tpm:
        tpm.owner_clear(_secret(owner_auth))


@app.command()
def presence(
    context: typer.Context,
    state: Annotated[
        Presence, typer.Argument(metavar="on|off", help="Until the TPM is started again.")
    ],
) -> None:
    """Say that a person is at the platform, or is not."""
    with _tpm(context) as tpm:
        _say_presence(tpm, is_there=state is Presence.ON)


@app.command()
def enable(context: typer.Context) -> None:
    """Switch on a TPM that was cleared, as a person at its platform would."""
    from protocol.constants import Ordinal  # noqa: PLC0415

    with _tpm(context) as tpm:
        _say_presence(tpm, is_there=True)
        try:
            tpm.call(Ordinal.PHYSICAL_ENABLE)
            tpm.call(Ordinal.PHYSICAL_SET_DEACTIVATED, state=False)
        finally:
            _say_presence(tpm, is_there=False)


@app.command()
def seal(
    context: typer.Context,
    source: Annotated[Path, typer.Argument(metavar="FILE", help="At most 149 bytes.")],
    blob: Annotated[Path, typer.Argument(metavar="BLOB", help="Where the sealed data go.")],
    pcr: Annotated[
        list[int] | None,
        typer.Option("--pcr", min=0, max=23, help="Bind to this PCR as it is now; repeatable."),
    ] = None,
    auth: Auth = WELL_KNOWN,
) -> None:
    """Seal a small file under the storage root key."""
    from protocol.wire import encode  # noqa: PLC0415

    data = _read(source)
    with _tpm(context) as tpm:
        release = {i: tpm.pcr_read(i) for i in pcr} if pcr else None
        sealed = tpm.seal(data, release=release, auth=_secret(auth))
    _write(blob, encode(sealed))


@app.command()
def unseal(
    context: typer.Context,
    blob: Annotated[Path, typer.Argument(metavar="BLOB")],
    target: Annotated[Path, typer.Argument(metavar="FILE")],
    auth: Auth = WELL_KNOWN,
) -> None:
    """Unseal what `seal` made."""
    from protocol.structures import StoredData, StoredData12  # noqa: PLC0415
    from protocol.wire import DecodeError, decode  # noqa: PLC0415

    content = _read(blob)
    structure: type[StoredData | StoredData12] = (
        StoredData12 if content[:2] == b"\x00\x16" else StoredData
    )
    try:
        sealed = decode(structure, content)
    except DecodeError as error:
        raise Failure(
            f"cannot unseal {blob}",
            why=f"it is no sealed data: {error}",
            next_step="Name a file that `vtpm tpm GUEST seal` wrote.",
            exit_code=ExitCode.DAMAGED,
        ) from error
    with _tpm(context) as tpm:
        secret = tpm.unseal(sealed, auth=_secret(auth))
    _write(target, secret)


@app.command()
def nv_define(
    context: typer.Context, index: Index, size: Size, owner_auth: OwnerAuth = WELL_KNOWN
) -> None:
    """Define an NV area that the owner reads and writes."""
    with _tpm(context) as tpm:
        tpm.nv_define_space(
            _index(index), size, _PUBLIC_OWNER_RIGHTS, owner_auth=_secret(owner_auth)
        )


@app.command()
def nv_write(
    context: typer.Context,
    index: Index,
    source: Annotated[Path, typer.Argument(metavar="FILE")],
    owner_auth: OwnerAuth = WELL_KNOWN,
) -> None:
    """Write a file into an NV area."""
    with _tpm(context) as tpm:
        tpm.nv_write_value(_index(index), _read(source), owner_auth=_secret(owner_auth))


@app.command()
def nv_read(
    context: typer.Context, index: Index, size: Size, owner_auth: OwnerAuth = WELL_KNOWN
) -> None:
    """Print an NV area in hex."""
    with _tpm(context) as tpm:
        print_line(tpm.nv_read_value(_index(index), size, owner_auth=_secret(owner_auth)).hex())


def _say_presence(tpm: TpmClient, *, is_there: bool) -> None:
    """TSC_PhysicalPresence: allow it as a command, then say it (Part 3 §6.6)."""
    from protocol.constants import Ordinal  # noqa: PLC0415

    for value in (_CMD_ENABLE, _PRESENT if is_there else _NOTPRESENT):
        tpm.call(Ordinal.TSC_PHYSICAL_PRESENCE, physical_presence=value)


@contextmanager
def _tpm(context: typer.Context) -> Iterator[TpmClient]:
    """The chosen TPM; its refusal, and an answer that is none, become failures that say so."""
    from daemons.guest.tpm0_client import Tpm0Client  # noqa: PLC0415 - slow to import
    from daemons.world import SystemRng  # noqa: PLC0415
    from protocol.return_codes import TpmError  # noqa: PLC0415
    from protocol.wire import DecodeError  # noqa: PLC0415
    from tpm12.client import TpmClient  # noqa: PLC0415
    from tpm12.client_core import BadResponseError  # noqa: PLC0415

    guest, root = context.obj
    path = Path(guest) if "/" in guest else tpm0_of(guest, root)
    with Tpm0Client(path) as connection:
        try:
            yield TpmClient(connection.exchange, rng=SystemRng())
        except TpmError as error:
            raise Failure(
                f"the TPM of {guest} refused",
                why=str(error),
                next_step=_next_step(error.code),
            ) from error
        except (BadResponseError, DecodeError) as error:
            raise Failure(
                f"the TPM of {guest} gave no proper answer",
                why=str(error),
                next_step="Something between here and the TPM changes bytes, or a secret is wrong.",
                exit_code=ExitCode.UNAVAILABLE,
            ) from error


_NEXT: Final = {
    "AUTHFAIL": "Give the right secret: --owner-auth, or --auth.",
    "AUTH2FAIL": "Give the right secret: --auth.",
    "BADINDEX": "Define that NV area first: vtpm tpm GUEST nv-define.",
    "BAD_DATASIZE": "Seal at most 149 bytes: a key, not what it encrypts.",
    "BAD_PRESENCE": "Say that somebody is there: vtpm tpm GUEST presence on.",
    "CLEAR_DISABLED": "Its owner has forbidden that until another owner comes.",
    "DEACTIVATED": "Switch it on, vtpm tpm GUEST enable, and start it again.",
    "DEFEND_LOCK_RUNNING": "Wait: too many wrong secrets were tried.",
    "DISABLED": "Switch it on: vtpm tpm GUEST enable.",
    "NOSPACE": "Stay within the area's size, or free some NV first.",
    "NOSRK": "Install an owner first: vtpm tpm GUEST takeownership.",
    "NO_ENDORSEMENT": "It has no endorsement key yet: its maker makes one.",
    "OWNER_SET": "It has an owner. Only that one can remove it: vtpm tpm GUEST clear.",
    "WRONGPCRVAL": "Other PCR values are needed; vtpm tpm GUEST pcr-read shows those of now.",
}
_LOOK_UP: Final = "Part 2 of the TPM 1.2 specification says what the code means."


def _next_step(code: ReturnCode) -> str:
    return _NEXT.get(code.name, _LOOK_UP)


def _secret(text: str) -> bytes:
    kind, _, value = text.partition(":")
    if text == WELL_KNOWN:
        return bytes(20)
    if kind == "text" and value:
        return hashlib.sha1(os.fsencode(value), usedforsecurity=False).digest()
    if kind == "hash":
        return _hex(value, 20)
    raise typer.BadParameter(f"a secret is {_FORMS}")


def _hex(text: str, size: int) -> bytes:
    try:
        data = bytes.fromhex(text)
    except ValueError as error:
        raise typer.BadParameter("not hexadecimal") from error
    if len(data) != size:
        raise typer.BadParameter(f"{2 * size} hex digits are needed, not {len(text)}")
    return data


def _index(text: str) -> int:
    try:
        index = int(text, 0)
    except ValueError as error:
        raise typer.BadParameter("an NV index is a number such as 0x11101") from error
    if not 0 <= index <= _NV_INDEX_MAX:
        raise typer.BadParameter("an NV index has 32 bits")
    return index


def _read(path: Path) -> bytes:
    why = f"it has more than {_FILE_BYTES_MAX} bytes"
    try:
        content = read_bytes(path, _FILE_BYTES_MAX)
        if len(content) <= _FILE_BYTES_MAX:
            return content
    except OSError as error:
        why = (error.strerror or str(error)).lower()
    raise Failure(
        f"cannot read {path}",
        why=why,
        next_step="Name a file that can be read.",
        exit_code=ExitCode.NO_INPUT,
    )


def _write(path: Path, data: bytes) -> None:
    """Write a file that nobody else may read."""
    try:
        write_private(path, data)
    except OSError as error:
        raise Failure(
            f"cannot write {path}",
            why=(error.strerror or str(error)).lower(),
            next_step="Name a file in a folder that is there and may be written.",
            exit_code=ExitCode.IO_ERROR,
        ) from error


def _sha1_of(path: Path | None) -> bytes:
    return hashlib.sha1(_read(path or Path()), usedforsecurity=False).digest()


def _number(tpm: TpmClient, capability: int) -> int:
    return int.from_bytes(tpm.get_property(capability), "big")


def _show(found: dict[str, object] | dict[str, str], *, as_json: bool) -> None:
    if as_json:
        print_json(found)
        return
    width = max(len(name) for name in found)
    for name, value in found.items():
        print_line(f"{name.replace('_', ' '):<{width}}  {value}")
