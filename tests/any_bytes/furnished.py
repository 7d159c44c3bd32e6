"""An owned TPM with one of everything at fixed handles, and a way past its authorization.

Requests that were recorded elsewhere fit in here once their handles are exchanged for these: keys
by usage, sessions by protocol and entity, transport sessions, DAA sessions. In `all_authorized()`
every HMAC is right and every session is bound to what it is used for, so that altered requests
reach the commands and not only the check before them.
"""

from contextlib import contextmanager
from unittest import mock

from protocol.constants import FamilyFlag
from protocol.wire import encode
from tests.tpm12.conftest import Bench, PooledPrimes, made_key
from tests.tpm12.daa_issuer import JOIN, SIGN, Issuer, Platform, join
from tests.tpm12.identities import loaded_identity
from tests.tpm12.makers import (
    AREA_AUTH,
    AUTHCHANGE,
    BIND,
    IDENTITY,
    LEGACY,
    MIGRATABLE,
    MIGRATE,
    SIGNING,
    STORAGE,
    define,
    loaded,
    signing,
    storage,
    template,
)
from tests.tpm12.witness import OWNER_AUTH, SRK_AUTH, ZERO, sha1
from tpm12 import authorization, transport
from tpm12.state import Counter, FamilyRow, Session, TransportSession

OIAP, OSAP, DSAP = 1, 2, 6
"""Values of ProtocolId."""
_KEYS, _SESSIONS, _TRANSPORTS, _DAA = 0x01000000, 0x02000000, 0x03000000, 0x04000000
_ENTITIES = (0x01, 0x02, 0x04, 0x0A, 0x0B)
"""KEYHANDLE, OWNER, SRK, COUNTER, NV: what sessions are bound to."""
_SHA1_START = 0xA0


def key_handle(usage):
    """Where the key of a usage (KeyUsage) is loaded."""
    return _KEYS + usage


def session_handle(protocol, entity_type=0, *, second=False):
    """Where the session of a kind is."""
    return _SESSIONS + (0x10000 if second else 0) + (protocol << 8) + entity_type


def transport_handle(*, encrypts):
    """Where the transport session is."""
    return _TRANSPORTS + 1 + encrypts


def daa_handle(kind, stage):
    """Where the DAA session is whose next stage is `stage`; `kind` is an ordinal."""
    return _DAA + (kind << 8) + stage


@contextmanager
def all_authorized():
    """Let every HMAC be right, and every session bound to what it is used for."""
    with (
        mock.patch.object(authorization, "is_same", return_value=True),
        mock.patch.object(transport, "is_same", return_value=True),
    ):
        yield


def ek_state(fresh_state):
    """The state with an endorsement key."""
    bench = Bench(fresh_state)
    key = made_key(PooledPrimes().primes(2048, 65537), 0x11, usage_auth=ZERO, migration_auth=ZERO)
    bench.change("permanent", endorsement_key=key, tpm_daa_seed=sha1(b"daa seed"))
    bench.set_flags(cekp_used=True, enable_revoke_ek=False)
    return bench.state


def owned_state(with_ek):
    """The state with an owner too."""
    bench = Bench(with_ek)
    primes = PooledPrimes()
    primes.primes(2048, 65537)
    proof = sha1(b"tpm proof")
    srk = made_key(primes.primes(2048, 65537), 0x11, usage_auth=SRK_AUTH, migration_auth=proof)
    bench.change(
        "permanent",
        srk=srk,
        owner_auth=OWNER_AUTH,
        tpm_proof=proof,
        context_key=bytes(range(16)),
        delegate_key=bytes(range(16, 32)),
    )
    bench.set_flags(read_pubek=False)
    return bench.state


def furnished_state(owned):
    """The owned state with keys, sessions, NV areas, counters, delegations, and a SHA-1 thread."""
    bench = Bench(owned)
    _load_keys(bench)
    _define_areas(bench)
    counter = Counter(label=b"cntr", auth_data=AREA_AUTH, value=7)
    bench.change("permanent", counters={0: counter, 1: counter}, counter_highest=7)
    maker = encode(bench.state.permanent.endorsement_key.pubkey())
    bench.change("permanent", manu_maint_pub=maker)
    bench.change("stclear", count_id=1)
    _delegate(bench)
    bench.tpm.send(_SHA1_START).ok()
    _open_sessions(bench)
    bench.present()
    return bench.state


def _load_keys(bench):
    tpm = bench.tpm
    wanted = {
        SIGNING: signing(flags=MIGRATABLE),
        STORAGE: storage(flags=MIGRATABLE),
        BIND: template(BIND, 3, 1, flags=MIGRATABLE),
        LEGACY: template(LEGACY, 3, 2),
        MIGRATE: template(MIGRATE, 3, 1, bits=2048),
    }
    at = {usage: loaded(tpm, blob)[0] for usage, blob in wanted.items()}
    at[IDENTITY], _ = loaded_identity(tpm)
    keys = {key_handle(usage): bench.state.volatile.keys[handle] for usage, handle in at.items()}
    primes = PooledPrimes().primes(2048, 65537)
    keys[key_handle(AUTHCHANGE)] = made_key(
        primes, AUTHCHANGE, usage_auth=ZERO, migration_auth=ZERO
    )
    bench.change("volatile", keys=keys)


def _define_areas(bench):
    for index, attributes in (
        (1, 0x20002),  # by the owner
        (2, 0x40004),  # by the area's secret
        (3, 0x2000),  # by nobody, once at a time
        (4, 0x80012004),  # with locks
    ):
        define(bench.tpm, index, attributes, 64, as_owner=True).ok()
    bench.set_flags(nv_locked=True)


def _delegate(bench):
    row = FamilyRow(label=1, verification_count=1, flags=FamilyFlag.ENABLED)
    bench.change("permanent", family_table={1: row, 2: row}, last_family_id=2)


def _open_sessions(bench):
    def session(protocol, entity_type):
        return Session(
            protocol=protocol,
            nonce_even=sha1(b"even"),
            entity_type=entity_type,
            entity_value=key_handle(STORAGE) if entity_type == 1 else 0,
            entity_digest=ZERO,
            adip=0,
            shared_secret=b"" if protocol == OIAP else sha1(b"shared"),
            delegation=b"",
        )

    kinds = [(OIAP, 0), *((OSAP, entity) for entity in _ENTITIES)]
    bench.change(
        "stany",
        sessions={
            session_handle(*kind, second=second): session(*kind)
            for kind in kinds
            for second in (False, True)
        },
        transport_sessions={
            transport_handle(encrypts=encrypts): TransportSession(
                auth_data=sha1(b"transport"),
                nonce_even=sha1(b"even"),
                attributes=encrypts,
                algorithm_id=6 if encrypts else 0,
                enc_scheme=5 if encrypts else 0,
                trans_digest=ZERO,
            )
            for encrypts in (0, 1)
        },
    )


def with_daa_sessions(owned, furnished):
    """The furnished state with a DAA session for each stage of join and sign that can come next."""
    issuer, sessions = Issuer(), {}
    credential = join(Bench(owned).tpm, issuer)
    for kind in (JOIN, SIGN):
        bench = Bench(owned)
        platform = Platform(bench.tpm, kind)
        for number, data0, data1 in platform.inputs(issuer, credential):
            if number:
                session = bench.state.stany.daa_sessions[platform.handle]
                sessions.setdefault(daa_handle(kind, number), session)
            platform.stage(data0, data1, again=platform.comes_again(number, data0, issuer))
    bench = Bench(furnished)
    bench.change("stany", daa_sessions=sessions)
    return bench.state
