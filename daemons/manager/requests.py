"""One request of one vTPM, from bytes to bytes. Pure, given a vault and a chip.

Source: Xen's `vtpm_cmd_handler.c`: tags, ordinals, return codes and who may send what. Where its
rules were weak they are not kept:

- A refusal leaves nothing behind. (There, repeating a refused request succeeded.)
- A vTPM that is new and one that is known passed the same admission, by label, before their first
  byte (`admission.py`). A new one is created by its first SAVEHASHKEY, for the UUID that the
  registry gives to the domain that asks.
- A UUID has one holder. A connection takes it with its first Load, Save or administration, also of
  a UUID that is not known yet, and gives it back when it ends. A newer connection of the same
  domain takes over: the registry knows one process per domain, so the older one is a leftover.
- A vTPM that a domain has is not deleted. Who has asked for its key is not enough to know: a
  manager that was killed has forgotten that, and a vTPM that runs on, or will, asks but once.
- Administration goes by label, never to whoever came first.
- What must not be done twice (VTPM_DEL, TPM_Extend of the chip) is remembered before it is done
  (`request_memory.py`); all else is the same done twice.
- Only untagged commands go through to the chip, of exactly the length they must have: nobody can
  name (and so kill) a session of the manager.

LOADHASHKEY answers BAD_PARAMETER with tag 0x01C4 for a UUID that the manager has never stored a key
for, and only then. Whatever else stands in the way (disk, chip, another holder) has another code:
a vTPM may start fresh on the one and must wait on the others.

Not there yet, and answered with BAD_ORDINAL: GET_QUOTE and the group ordinals; there is one group,
number 0. Leaves to others: locking (one request at a time may be in here), the ring.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Final, Protocol
from uuid import UUID

from daemons.errors import Failure
from daemons.manager.admission import Client
from daemons.manager.vault_format import Full, Record
from protocol.constants import Ordinal, Tag
from protocol.manager_messages import (
    ERROR_TAG_OFFSET,
    HASH_KEY_BYTES_MAX,
    HASH_KEY_BYTES_MIN,
    HEADER_BYTES,
    GetBootHashOut,
    GroupListOut,
    Header,
    LoadHashKeyOut,
    ManagerOrdinal,
    ManagerTag,
    Nothing,
    SaveHashKeyIn,
    VtpmListIn,
    VtpmListOut,
    VtpmUuid,
    packet,
    split,
)
from protocol.return_codes import ReturnCode, TpmError
from protocol.wire import DecodeError, decode, decode_from

PACKET_BYTES_MAX: Final = 4088
"""What one tpmif page holds."""
UUIDS_PER_LIST: Final = (PACKET_BYTES_MAX - HEADER_BYTES - 4) // 16
GROUP_COUNT: Final = 1
PASSED_ON_BYTES: Final = {Ordinal.GET_RANDOM: 14, Ordinal.PCR_READ: 14, Ordinal.EXTEND: 34}
"""Commands of the hardware TPM that clients may send, and their exact lengths."""
TPM_TAGS: Final = (Tag.RQU_COMMAND, Tag.RQU_AUTH1_COMMAND, Tag.RQU_AUTH2_COMMAND)


class Records(Protocol):
    """What requests need of the vault. Everything may raise Failure."""

    def load(self, uuid: UUID) -> Record | None:
        """Give a record, or None."""

    def save(self, record: Record) -> None:
        """Store a record durably."""

    def delete(self, uuid: UUID) -> None:
        """Remove a record durably."""

    def __contains__(self, uuid: UUID) -> bool: ...

    def __iter__(self) -> Iterator[UUID]: ...


class OnceOnly(Protocol):
    """Remembers one request that must not be carried out twice."""

    def begin(self) -> None:
        """Call it when all checks are passed, and before anything is done."""

    def answer(self, response: bytes) -> None:
        """Call it as soon as there is a response, and before what was done is forgotten."""


class Hardware(Protocol):
    """What requests need of the chip. Raises Failure when the chip does not answer."""

    def exchange(self, request: bytes) -> bytes:
        """Run one command that may be run twice."""

    def run_once(self, request: bytes, once: OnceOnly) -> bytes:
        """Run one command that may not."""


class Requests:
    """Answers the requests of all connected vTPMs.

    Args:
        records: The vault.
        hardware: The chip.
        report: Told what went wrong on our side, when a client only gets a code for it.
        is_attached: Whether a domain has a vTPM; may raise Failure.
        recovered: Told that what went wrong last has been done again, and well.
    """

    def __init__(
        self,
        records: Records,
        hardware: Hardware,
        report: Callable[[Failure], None],
        is_attached: Callable[[UUID], bool],
        recovered: Callable[[], None] = lambda: None,
    ) -> None:
        self._records = records
        self._is_attached = is_attached
        self._hardware = hardware
        self._report_failure = report
        self._recovered = recovered
        self._is_failing = False
        self._failed_ordinal: int | None = None
        self._holders: dict[UUID, Client] = {}

    def execute(self, client: Client, request: bytes, once: OnceOnly) -> bytes:
        """Answer one request.

        Args:
            client: Who asks; its connection is open until `disconnected` is called.
            request: The whole packet, any bytes.
            once: Remembers it, if it must not be carried out twice.

        Returns:
            The whole answer; there always is one.
        """
        if len(request) < HEADER_BYTES:
            return packet(Tag.RSP_COMMAND, ReturnCode.BAD_PARAMETER)
        header, _ = decode_from(Header, request, 0)
        self._is_failing = False
        try:
            answer = self._dispatch(client, header, request, once)
        except _RefusedError as refused:
            tag = (header.tag + ERROR_TAG_OFFSET) & 0xFFFF if refused.tag is None else refused.tag
            answer = packet(tag, refused.code)
        self._tell_how_it_goes(header.code)
        return answer

    def _report(self, failure: Failure) -> None:
        self._is_failing = True
        self._report_failure(failure)

    def _tell_how_it_goes(self, ordinal: int) -> None:
        """What people are shown is the last failure, until the same is done without one."""
        if self._is_failing:
            self._failed_ordinal = ordinal
        elif ordinal == self._failed_ordinal:
            self._failed_ordinal = None
            self._recovered()

    def _dispatch(self, client: Client, header: Header, request: bytes, once: OnceOnly) -> bytes:
        try:
            _, body = split(request)
        except DecodeError:
            # Not BAD_PARAMETER: that would tell a vTPM that it is new.
            raise _RefusedError(ReturnCode.BAD_PARAM_SIZE) from None
        if header.tag == ManagerTag.VTPM_TAG_REQ:
            return self._client_command(client, header.code, body)
        if header.tag == ManagerTag.VTPM_TAG_REQ2:
            return self._management(client, header.code, body, once)
        if header.tag in TPM_TAGS:
            return self._pass_on(client, header, request, once)
        raise _RefusedError(ReturnCode.BADTAG)

    def disconnected(self, client: Client) -> None:
        """Give back what a connection held. Harmless for one that held nothing."""
        if self.holds(client):
            del self._holders[client.uuid]

    def holds(self, client: Client) -> bool:
        """Whether this connection has its vTPM."""
        holder = self._holders.get(client.uuid)
        return holder is not None and holder.connection_id == client.connection_id

    def holder_of(self, uuid: UUID) -> Client | None:
        """Who has a vTPM open."""
        return self._holders.get(uuid)

    # -- tag 0x01C1

    def _client_command(self, client: Client, ordinal: int, body: bytes) -> bytes:
        try:
            if ordinal == ManagerOrdinal.SAVEHASHKEY:
                results: object = self._save_hash_key(client, body)
            elif ordinal == ManagerOrdinal.LOADHASHKEY:
                results = self._load_hash_key(client)
            elif ordinal == ManagerOrdinal.GET_BOOT_HASH:
                decode(Nothing, body)
                results = GetBootHashOut(kern_hash=client.boot_hash)
            else:
                return packet(ManagerTag.VTPM_TAG_RSP, ReturnCode.BAD_ORDINAL)
        except (TpmError, DecodeError, Failure) as error:
            return packet(ManagerTag.VTPM_TAG_RSP, self._code(error))
        return packet(ManagerTag.VTPM_TAG_RSP, ReturnCode.SUCCESS, results)

    def _save_hash_key(self, client: Client, body: bytes) -> Nothing:
        blob = decode(SaveHashKeyIn, body).hash_key.ljust(HASH_KEY_BYTES_MAX, b"\0")
        self._attach(client)
        known = self._records.load(client.uuid)
        # The same blob again is a repeat after a broken link: it is stored already.
        if known is None or known.hash_key != blob:
            flags, group = (known.flags, known.group) if known else (0, 0)
            record = Record(uuid=client.uuid.bytes, flags=flags, group=group, hash_key=blob)
            self._records.save(record)
        return Nothing()

    def _load_hash_key(self, client: Client) -> LoadHashKeyOut:
        self._attach(client)
        known = self._records.load(client.uuid)
        if known is None:
            raise TpmError(ReturnCode.BAD_PARAMETER, "no key was ever stored for this vTPM")
        is_short = not any(known.hash_key[HASH_KEY_BYTES_MIN:])
        length = HASH_KEY_BYTES_MIN if is_short else HASH_KEY_BYTES_MAX
        return LoadHashKeyOut(hash_key=known.hash_key[:length])

    def _attach(self, client: Client) -> None:
        """Take the vTPM for this connection.

        Raises:
            TpmError: DISABLED when another domain holds it, or a newer connection of the same; then
                nothing has changed.
        """
        holder = self._holders.get(client.uuid)
        if holder is not None and holder.domain != client.domain:
            raise TpmError(ReturnCode.DISABLED, f"{holder.domain} has it open")
        if holder is not None and holder.connection_id > client.connection_id:
            raise TpmError(ReturnCode.DISABLED, "a newer connection of its domain took over")
        self._holders[client.uuid] = client

    # -- tag 0x01C2

    def _management(self, client: Client, ordinal: int, body: bytes, once: OnceOnly) -> bytes:
        if not self._is_administrator(client):
            raise _RefusedError(ReturnCode.AUTHFAIL)
        try:
            if ordinal == ManagerOrdinal.GROUP_LIST:
                decode(Nothing, body)
                results: object = GroupListOut(count=GROUP_COUNT)
            elif ordinal == ManagerOrdinal.VTPM_LIST:
                results = self._vtpm_list(body)
            elif ordinal == ManagerOrdinal.VTPM_DEL:
                results = self._vtpm_del(body, once)
            else:
                raise _RefusedError(ReturnCode.BAD_ORDINAL)
        except (TpmError, DecodeError, Failure) as error:
            return packet(ManagerTag.VTPM_TAG_RSP, self._code(error))
        return packet(ManagerTag.VTPM_TAG_RSP, ReturnCode.SUCCESS, results)

    def _vtpm_list(self, body: bytes) -> VtpmListOut:
        # Bytes behind the offset are ignored, as Xen's manager does.
        asked, _ = decode_from(VtpmListIn, body, 0)
        if asked.group >= GROUP_COUNT:
            raise TpmError(ReturnCode.BADINDEX, f"there is no group {asked.group}")
        uuids = [uuid.bytes for uuid in self._records]
        told = uuids[asked.offset : asked.offset + UUIDS_PER_LIST]
        return VtpmListOut(total=len(uuids), uuids=b"".join(told))

    def _vtpm_del(self, body: bytes, once: OnceOnly) -> Nothing:
        uuid = UUID(bytes=decode(VtpmUuid, body).uuid)
        is_open = uuid in self._holders or self._is_attached(uuid)
        if is_open or uuid not in self._records:
            raise TpmError(ReturnCode.FAIL, "it is open, or there is no such vTPM")
        once.begin()  # now, so that a record that is gone later was deleted by this request
        self._records.delete(uuid)
        return Nothing()

    def _is_administrator(self, client: Client) -> bool:
        if client.is_administrator:
            # Its first request after a crash may be this one, and comes from a vTPM that loaded its
            # key long ago. Somebody else with its UUID keeps it out, as it keeps out a Load.
            with contextlib.suppress(TpmError):
                self._attach(client)
        return client.is_administrator and self.holds(client)

    def _code(self, error: TpmError | DecodeError | Failure) -> ReturnCode:
        """The return code of a command that was handled and failed."""
        if isinstance(error, TpmError):
            return error.code
        if isinstance(error, DecodeError):
            return ReturnCode.BAD_PARAMETER
        self._report(error)
        return ReturnCode.NOSPACE if isinstance(error, Full) else ReturnCode.IOERROR

    # -- commands for the chip

    def _pass_on(self, client: Client, header: Header, request: bytes, once: OnceOnly) -> bytes:
        ordinal = header.code
        if ordinal not in PASSED_ON_BYTES:
            raise _RefusedError(ReturnCode.DISABLED_CMD)
        if ordinal == Ordinal.EXTEND and not self._is_administrator(client):
            raise _RefusedError(ReturnCode.DISABLED_CMD)
        if len(request) != PASSED_ON_BYTES[Ordinal(ordinal)]:
            raise _RefusedError(ReturnCode.BAD_PARAMETER, Tag.RSP_COMMAND)
        if header.tag != Tag.RQU_COMMAND:
            raise _RefusedError(ReturnCode.BADTAG)
        try:
            if ordinal == Ordinal.EXTEND:
                return self._hardware.run_once(request, once)
            return self._hardware.exchange(request)
        except Failure as failure:
            self._report(failure)
            raise _RefusedError(ReturnCode.IOERROR) from failure


def response_of_deletion(request: bytes, records: Records) -> bytes | None:
    """Find out whether a VTPM_DEL that was begun was carried out.

    Args:
        request: The whole packet, which had passed all checks.
        records: The vault, as it was found after a crash.

    Returns:
        Its response, or None when it was not carried out.
    """
    _, body = split(request)
    if UUID(bytes=decode(VtpmUuid, body).uuid) in records:
        return None
    return packet(ManagerTag.VTPM_TAG_RSP, ReturnCode.SUCCESS, Nothing())


class _RefusedError(Exception):
    """The dispatcher says no; the answer carries the request's tag plus 3 unless one is given."""

    def __init__(self, code: ReturnCode, tag: int | None = None) -> None:
        super().__init__(code)
        self.code = code
        self.tag = tag
