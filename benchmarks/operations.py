"""What is measured: TPM commands built once, timed from the send to the last byte of the answer.

An operation is a function that performs it once and gives the nanoseconds spent on the wire; HMACs
and parsing of the client are outside. The endpoint's TPM is brought up with well-known secrets.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable
from dataclasses import dataclass
from time import perf_counter_ns

from benchmarks.endpoints import Wire
from protocol.constants import (
    CapabilityArea,
    EntityType,
    KeyHandleValue,
    KeyUsage,
    NvAttribute,
    Ordinal,
    ResourceType,
    SigScheme,
)
from protocol.return_codes import ReturnCode, TpmError
from protocol.structures import Key, Key12
from tpm12.client import WELL_KNOWN, TpmClient, selection
from tpm12.client_core import ClientSession, Use
from tpm12.crypto import sha1

Operation = Callable[[], int]
SRK = int(KeyHandleValue.SRK)
NV_OWNER, NV_AUTH, NV_FREE = 0x00011101, 0x00011103, 0x00011104
DATA = [bytes([i]) + bytes(range(31)) for i in range(2)]


class SystemRng:
    """The kernel's random bytes."""

    def random(self, size: int, /) -> bytes:
        """Give `size` bytes."""
        return os.urandom(size)


_ATTRIBUTES = {
    NV_OWNER: NvAttribute.OWNERWRITE | NvAttribute.OWNERREAD,
    NV_AUTH: NvAttribute.AUTHWRITE | NvAttribute.AUTHREAD,
    NV_FREE: NvAttribute.OWNERWRITE,
}
"""Of the areas that are measured; what has no right to read it is read by anyone."""


class Endpoint:
    """One TPM under test, with its owner, keys, areas and counter made on demand.

    Args:
        label: How tables call it.
        wire: Reaches it.
    """

    def __init__(self, label: str, wire: Wire) -> None:
        self.label = label
        self.ns = 0
        self._wire = wire
        self.tpm = TpmClient(self._timed, rng=SystemRng())
        self._key: int | None = None
        self._blob: Key | Key12 | None = None
        self._counter: int | None = None
        self._areas: set[int] = set()
        self._sessions: list[ClientSession] = []
        self._bring_up()

    def _timed(self, request: bytes) -> bytes:
        exchange, message = self._wire.exchange, self._wire.message_of(request)
        start = perf_counter_ns()
        answer = exchange(message)
        self.ns += perf_counter_ns() - start
        return self._wire.response_of(answer)

    def taking(self, action: Callable[[], object]) -> int:
        """Nanoseconds on the wire of everything that an action sends."""
        self.ns = 0
        action()
        return self.ns

    def _bring_up(self) -> None:
        for step in (self.tpm.startup, self.tpm.create_endorsement_key_pair):
            try:
                step()
            except TpmError as error:
                if error.code not in {ReturnCode.INVALID_POSTINIT, ReturnCode.DISABLED_CMD}:
                    raise
        self.tpm.continue_self_test()
        if not any(self.tpm.get_property(0x111)):
            self.tpm.take_ownership()

    def session(self) -> ClientSession:
        """A session for one operation; closed by `rest()`."""
        opened = self.tpm.oiap()
        self._sessions.append(opened)
        return opened

    def rest(self) -> None:
        """Close the sessions of an operation."""
        for session in self._sessions:
            self.tpm.end_session(session)
        self._sessions.clear()

    def area(self, index: int) -> int:
        """A defined NV area of 32 bytes."""
        if index not in self._areas:
            self.tpm.nv_define_space(index, 32, int(_ATTRIBUTES[index]))
            self._areas.add(index)
        return index

    def blob(self) -> Key | Key12:
        """A wrapped signing key."""
        if self._blob is None:
            self._blob = self.tpm.create_wrap_key(KeyUsage.SIGNING)
        return self._blob

    def key(self) -> int:
        """A loaded signing key."""
        if self._key is None:
            self._key = self.tpm.load_key2(self.blob())
        return self._key

    def counter(self) -> int:
        """A counter that may be incremented."""
        if self._counter is None:
            self._counter = self.tpm.create_counter(b"BNCH")[0]
        return self._counter


@dataclass(frozen=True)
class Measured:
    """One row of the table."""

    name: str
    title: str
    make: Callable[[Endpoint], Operation]
    is_key_generation: bool = False


def plain(ordinal: int, **operands: object) -> Callable[[Endpoint], Operation]:
    """A command without authorization."""

    def make(endpoint: Endpoint) -> Operation:
        return lambda: endpoint.taking(lambda: endpoint.tpm.call(ordinal, **operands))

    return make


def authorized(
    ordinal: int, operands: Callable[[Endpoint], dict[str, object]]
) -> Callable[[Endpoint], Operation]:
    """A command on one continued OIAP session with a well-known secret."""

    def make(endpoint: Endpoint) -> Operation:
        use = Use(endpoint.session(), WELL_KNOWN, continues=True)
        given = operands(endpoint)
        return lambda: endpoint.taking(lambda: endpoint.tpm.call(ordinal, use, **given))

    return make


def _oiap(endpoint: Endpoint) -> Operation:
    return lambda: endpoint.taking(lambda: endpoint.tpm.end_session(endpoint.tpm.oiap()))


def _osap(endpoint: Endpoint) -> Operation:
    tpm = endpoint.tpm
    return lambda: endpoint.taking(
        lambda: tpm.end_session(tpm.osap(EntityType.SRK, SRK, WELL_KNOWN))
    )


def _nv_write(ordinal: int, index: int) -> Callable[[Endpoint], Operation]:
    def make(endpoint: Endpoint) -> Operation:
        use = Use(endpoint.session(), WELL_KNOWN, continues=True)
        endpoint.area(index)
        # Each write differs from the one before: a TPM may skip the store of equal data.
        following = itertools.cycle(DATA)

        def write() -> None:
            endpoint.tpm.call(ordinal, use, nv_index=index, offset=0, data=next(following))

        return lambda: endpoint.taking(write)

    return make


def _nv_read_free(endpoint: Endpoint) -> Operation:
    index = endpoint.area(NV_FREE)
    endpoint.tpm.nv_write_value(index, DATA[0])
    return plain(Ordinal.NV_READ_VALUE, nv_index=index, offset=0, data_size=32)(endpoint)


def _context(endpoint: Endpoint) -> Operation:
    tpm, key = endpoint.tpm, endpoint.key()

    def save_and_load() -> int:
        saved = tpm.call(
            Ordinal.SAVE_CONTEXT, handle=key, resource_type=ResourceType.KEY, label=bytes(16)
        )
        loaded = tpm.call(
            Ordinal.LOAD_CONTEXT,
            entity_handle=0,
            keep_handle=False,
            context_blob=saved.context_blob,
        )
        return int(loaded.handle)

    def run() -> int:
        handles: list[int] = []
        took = endpoint.taking(lambda: handles.append(save_and_load()))
        tpm.flush_specific(handles[0], ResourceType.KEY)
        return took

    return run


def _sha1(endpoint: Endpoint) -> Operation:
    tpm = endpoint.tpm

    def run() -> None:
        tpm.call(Ordinal.SHA1_START)
        tpm.call(Ordinal.SHA1_UPDATE, hash_data=bytes(64))
        tpm.call(Ordinal.SHA1_COMPLETE, hash_data=bytes(32))

    return lambda: endpoint.taking(run)


def _seal(endpoint: Endpoint) -> Operation:
    tpm = endpoint.tpm

    def run() -> int:
        session = tpm.osap(EntityType.SRK, SRK, WELL_KNOWN)
        masked = session.mask(WELL_KNOWN)
        return endpoint.taking(
            lambda: tpm.call(
                Ordinal.SEAL,
                Use(session),
                key_handle=SRK,
                enc_auth=masked,
                pcr_info=b"",
                in_data=bytes(range(32)),
            )
        )

    return run


def _unseal(endpoint: Endpoint) -> Operation:
    tpm = endpoint.tpm
    blob = tpm.seal(bytes(range(32)))
    uses = [Use(endpoint.session(), WELL_KNOWN, continues=True) for _ in range(2)]
    return lambda: endpoint.taking(
        lambda: tpm.call(Ordinal.UNSEAL, *uses, parent_handle=SRK, in_data=blob)
    )


def _load_key2(endpoint: Endpoint) -> Operation:
    tpm, blob = endpoint.tpm, endpoint.blob()
    use = Use(endpoint.session(), WELL_KNOWN, continues=True)

    def run() -> None:
        out = tpm.call(Ordinal.LOAD_KEY2, use, parent_handle=SRK, in_key=blob)
        tpm.flush_specific(out.inkey_handle, ResourceType.KEY)

    return lambda: endpoint.taking(run)


def _create_wrap_key(bits: int) -> Callable[[Endpoint], Operation]:
    def make(endpoint: Endpoint) -> Operation:
        return lambda: endpoint.taking(
            lambda: endpoint.tpm.create_wrap_key(
                KeyUsage.SIGNING, bits=bits, sig_scheme=SigScheme.RSASSAPKCS1V15_SHA1
            )
        )

    return make


OPERATIONS = (
    Measured(
        "getcap",
        "GetCapability(VERSION)",
        plain(Ordinal.GET_CAPABILITY, cap_area=CapabilityArea.VERSION, sub_cap=b""),
    ),
    Measured("pcrread", "PCRRead", plain(Ordinal.PCR_READ, pcr_index=0)),
    Measured("extend", "Extend", plain(Ordinal.EXTEND, pcr_num=10, in_digest=sha1(b"x"))),
    Measured("getrandom", "GetRandom(32)", plain(Ordinal.GET_RANDOM, bytes_requested=32)),
    Measured("oiap", "OIAP + FlushSpecific", _oiap),
    Measured("osap", "OSAP(SRK) + FlushSpecific", _osap),
    Measured(
        "readpub",
        "OwnerReadInternalPub(SRK)",
        authorized(Ordinal.OWNER_READ_INTERNAL_PUB, lambda _: {"key_handle": SRK}),
    ),
    Measured(
        "nv_write_owner",
        "NV_WriteValue 32 B, owner, changed",
        _nv_write(Ordinal.NV_WRITE_VALUE, NV_OWNER),
    ),
    Measured(
        "nv_same_owner",
        "NV_WriteValue 32 B, owner, same",
        authorized(
            Ordinal.NV_WRITE_VALUE,
            lambda e: {"nv_index": e.area(NV_OWNER), "offset": 0, "data": DATA[0]},
        ),
    ),
    Measured("nv_read_free", "NV_ReadValue 32 B, nobody's", _nv_read_free),
    Measured(
        "nv_read_owner",
        "NV_ReadValue 32 B, owner",
        authorized(
            Ordinal.NV_READ_VALUE,
            lambda e: {"nv_index": e.area(NV_OWNER), "offset": 0, "data_size": 32},
        ),
    ),
    Measured(
        "nv_write_auth",
        "NV_WriteValueAuth 32 B, changed",
        _nv_write(Ordinal.NV_WRITE_VALUE_AUTH, NV_AUTH),
    ),
    Measured(
        "increment",
        "IncrementCounter",
        authorized(Ordinal.INCREMENT_COUNTER, lambda e: {"count_id": e.counter()}),
    ),
    Measured("sha1", "SHA1Start + Update + Complete", _sha1),
    Measured("context", "SaveContext + LoadContext (its flush untimed)", _context),
    Measured("seal", "Seal (its OSAP untimed)", _seal),
    Measured("unseal", "Unseal", _unseal),
    Measured(
        "sign2048",
        "Sign, RSA-2048",
        authorized(Ordinal.SIGN, lambda e: {"key_handle": e.key(), "area_to_sign": sha1(b"s")}),
    ),
    Measured(
        "quote2048",
        "Quote, RSA-2048, 2 PCRs",
        authorized(
            Ordinal.QUOTE,
            lambda e: {
                "key_handle": e.key(),
                "external_data": sha1(b"q"),
                "target_pcr": selection((0, 1)),
            },
        ),
    ),
    Measured("loadkey2", "LoadKey2 + FlushSpecific", _load_key2),
    Measured("create1024", "CreateWrapKey 1024 (mean)", _create_wrap_key(1024), True),
    Measured("create2048", "CreateWrapKey 2048 (mean)", _create_wrap_key(2048), True),
)
