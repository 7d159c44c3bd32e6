"""Sessions that use a delegation, and the owner pointer (Part 3, §18.1 to §18.4, Part 2 §20)."""

from dataclasses import replace

import pytest

from protocol.constants import Ordinal
from protocol.return_codes import ReturnCode
from tests.tpm12.delegation_makers import (
    AES,
    ALL_KEY,
    ALL_OWNER,
    DEL_AUTH,
    ENABLE,
    ET_KEY_BLOB,
    ET_OWNER_BLOB,
    ET_ROW,
    INTEGRITY_AT,
    INVALIDATE,
    KEY_BITS,
    OFF,
    ON,
    aes_masked,
    by_blob,
    by_key,
    by_row,
    clear_blob,
    create_owner,
    dsap,
    dsap_request,
    key_blob,
    load_owner,
    loaded_row,
    manage,
    new_family,
    owner_blob,
    owner_oiap,
    owner_osap,
    pcr_info,
    public,
    set_pointer,
    srk_osap,
    with_count,
)
from tests.tpm12.makers import (
    AREA_AUTH,
    DATA_AUTH,
    KEY_AUTH,
    SIGNING,
    composite,
    define,
    loaded,
    signing,
    storage,
    unseal,
)
from tests.tpm12.witness import (
    EK,
    OWNER,
    OWNER_AUTH,
    SRK,
    SRK_AUTH,
    ZERO,
    key_template,
    number,
    sha1,
    sized,
    u16,
    u32,
)
from tpm12.client import TpmClient
from tpm12.client_core import Use
from tpm12.commands import ALL
from tpm12.delegation import PERMISSIONS
from tpm12.keys import LoadedKey, described
from tpm12.state import Counter

ET_KEY, ET_OWNER, ET_COUNTER = 0x01, 0x02, 0x0A
OWNER_READ_PUBEK, DISABLE_PUBEK_READ, GET_CAPABILITY_OWNER = 0x7D, 0x7E, 0x66
SEAL, SIGN, GET_PUB_KEY, EXTEND, CHANGE_AUTH_OWNER, CREATE_COUNTER = (
    0x17,
    0x3C,
    0x21,
    0x14,
    0x10,
    0xDC,
)
MAKE_IDENTITY, CERTIFY_KEY, CMK_SET_RESTRICTIONS, RESET_LOCK = 0x79, 0x32, 0x1C, 0x40
PUBEK_BIT, DISABLE_PUBEK_BIT = 1 << 9, 1 << 8
SIGN_BIT, SEAL_BIT, CERTIFY_BIT = 1 << 14, 1 << 1, 1 << 12
TEXT = sized(sha1(b"to be signed"))


def owner_pubek(tpm, session, **more):
    return tpm.auth(OWNER_READ_PUBEK, b"", session, **more)


def sign(tpm, handle, session, **more):
    return tpm.auth(SIGN, TEXT, session, handles=u32(handle), **more)


def open_code(tpm, entity_type, value, handle=0):
    return dsap_request(tpm, entity_type, value, handle)[0].code


@pytest.fixture
def family(owned):
    """An enabled family of an owned TPM."""
    return new_family(owned.tpm)


@pytest.fixture
def signer(owned):
    """A loaded signing key."""
    return loaded(owned.tpm, signing())[0]


def signer_blob(tpm, family, signer, per1=ALL_KEY, **more):
    session = tpm.osap(ET_KEY, signer, KEY_AUTH)
    return key_blob(tpm, family, per1, handle=signer, session=session, **more)


# -- the table of permissions ----------------------------------------------------------------------

OWNER_BITS = {
    31: "KeyControlOwner", 30: "SetOrdinalAuditStatus", 29: "DirWriteAuth", 28: "CMK_ApproveMA",
    27: "NV_WriteValue", 26: "CMK_CreateTicket", 25: "NV_ReadValue",
    24: "Delegate_LoadOwnerDelegation", 23: "DAA_Join", 22: "AuthorizeMigrationKey",
    21: "CreateMaintenanceArchive", 20: "LoadMaintenanceArchive", 19: "KillMaintenanceFeature",
    18: "OwnerReadInternalPub", 17: "ResetLockValue", 16: "OwnerClear", 15: "DisableOwnerClear",
    14: "NV_DefineSpace", 13: "OwnerSetDisable", 12: "SetCapability", 11: "MakeIdentity",
    10: "ActivateIdentity", 9: "OwnerReadPubek", 8: "DisablePubekRead",
    5: "Delegate_UpdateVerification", 4: "CreateCounter", 3: "ReleaseCounterOwner",
    2: "Delegate_Manage", 1: "Delegate_CreateOwnerDelegation", 0: "DAA_Sign",
}  # fmt: skip
KEY_BITS_OF = {
    28: "CMK_ConvertMigration", 27: "TickStampBlob", 26: "ChangeAuthAsymStart",
    25: "ChangeAuthAsymFinish", 24: "CMK_CreateKey", 23: "MigrateKey", 22: "LoadKey2",
    21: "EstablishTransport", 20: "ReleaseTransportSigned", 19: "Quote2", 18: "Sealx",
    17: "MakeIdentity", 16: "ActivateIdentity", 15: "GetAuditDigestSigned", 14: "Sign",
    13: "CertifyKey2", 12: "CertifyKey", 11: "CreateWrapKey", 10: "CMK_CreateBlob",
    9: "CreateMigrationBlob", 8: "ConvertMigrationBlob", 7: "Delegate_CreateKeyDelegation",
    6: "ChangeAuth", 5: "GetPubKey", 4: "UnBind", 3: "Quote", 2: "Unseal", 1: "Seal", 0: "LoadKey",
}  # fmt: skip
NOT_DELEGATABLE = {"GetCapabilityOwner", "ChangeAuthOwner", "CMK_SetRestrictions", "TakeOwnership"}
NAMES = {declared.ordinal: declared.name for declared in ALL}


@pytest.mark.parametrize(("delegate_type", "expected"), [(1, OWNER_BITS), (2, KEY_BITS_OF)])
def test_permissions_are_the_specifications(delegate_type, expected):
    found = {bit.bit_length() - 1: ordinal for ordinal, bit in PERMISSIONS[delegate_type].items()}
    not_served = (
        {Ordinal.FIELD_UPGRADE: 6, Ordinal.SET_REDIRECTION: 7} if delegate_type == 1 else {}
    )
    for ordinal, bit in not_served.items():
        assert found.pop(bit) == ordinal
    assert {bit: NAMES[ordinal] for bit, ordinal in found.items()} == expected


def test_every_command_with_owner_authorization_has_its_permission():
    by_owner = {
        declared.name for declared in ALL if any("owner" in by.over for by in declared.sessions)
    }
    assert by_owner == set(OWNER_BITS.values()) | NOT_DELEGATABLE


def test_every_command_with_key_authorization_has_its_permission():
    by_key_session = {
        declared.name
        for declared in ALL
        for by in declared.sessions
        if by.over.endswith("handle") or by.over in ("parent", "srk", "key", "identity")
    }
    assert by_key_session == set(KEY_BITS_OF.values())


# -- setting up ------------------------------------------------------------------------------------


def test_delegation_works_under_its_own_secret(owned, family):
    tpm = owned.tpm
    blob = owner_blob(tpm, family)
    session = by_blob(tpm, blob)
    for _ in range(3):
        owner_pubek(tpm, session).ok()  # the witness checks HMACs and nonces
    assert session.continues
    wrong = by_blob(tpm, blob, secret=OWNER_AUTH)
    assert owner_pubek(tpm, wrong).code == ReturnCode.AUTHFAIL
    owner_pubek(tpm, by_row(tpm, loaded_row(tpm, family))).ok()


def test_key_delegation_works_under_its_own_secret(owned, family, signer):
    tpm = owned.tpm
    blob = signer_blob(tpm, family, signer)
    sign(tpm, signer, by_key(tpm, blob, signer)).ok()
    wrong = by_key(tpm, blob, signer, secret=KEY_AUTH)
    assert sign(tpm, signer, wrong).code == ReturnCode.AUTHFAIL


def test_delegation_under_aes_masks_new_secrets(owned, family):
    tpm = owned.tpm
    blob, row, key = owner_blob(tpm, family), loaded_row(tpm, family), key_blob(tpm, family)
    for entity_type, value in ((ET_OWNER_BLOB, blob), (ET_ROW, u32(row))):
        session = dsap(tpm, AES | entity_type, value)
        counter = tpm.auth(CREATE_COUNTER, aes_masked(session, AREA_AUTH) + b"cntr", session).ok()
        tpm.auth(0xDD, counter[:4], tpm.oiap(AREA_AUTH).ending()).ok()
        tpm.auth(0xE0, counter[:4], owner_oiap(tpm)).ok()
        owned.change("stclear", count_id=0xFFFFFFFF)
    session = dsap(tpm, AES | ET_KEY_BLOB, key, SRK)
    params = aes_masked(session, DATA_AUTH) + sized(b"") + sized(b"sealed")
    blob = tpm.auth(SEAL, params, session, handles=u32(SRK)).ok()
    assert unseal(tpm, blob).ok() == sized(b"sealed")


def test_delegation_masks_new_secrets_and_then_ends(owned, family):
    tpm = owned.tpm
    session = by_key(tpm, key_blob(tpm, family))
    params = session.masked(DATA_AUTH) + sized(b"") + sized(b"sealed")
    blob = tpm.auth(SEAL, params, session, handles=u32(SRK)).ok()
    assert not session.continues
    assert unseal(tpm, blob).ok() == sized(b"sealed")


@pytest.mark.parametrize("entity_type", [0, 1, 2, 3, 4, 5, 6, 0x0A, 0x0B, 0x0C, 0x40])
def test_other_entity_types_are_bad_parameter(owned, family, entity_type):
    assert open_code(owned.tpm, entity_type, owner_blob(owned.tpm, family)) == 0x03


@pytest.mark.parametrize("adip", [1, 5, 7, 0xFF])
def test_other_adip_schemes_are_inappropriate_enc(owned, family, adip):
    blob = owner_blob(owned.tpm, family)
    code = open_code(owned.tpm, adip << 8 | ET_OWNER_BLOB, blob)
    assert code == ReturnCode.INAPPROPRIATE_ENC


def test_fips_mode_masks_with_aes_only(owned, family):
    blob = owner_blob(owned.tpm, family)
    owned.set_flags(fips=True)
    assert open_code(owned.tpm, ET_OWNER_BLOB, blob) == ReturnCode.INAPPROPRIATE_ENC
    assert open_code(owned.tpm, AES | ET_OWNER_BLOB, blob) == 0


def test_no_owner_is_nosrk(with_ek):
    for entity_type in (ET_OWNER_BLOB, ET_ROW, ET_KEY_BLOB, 0):
        assert open_code(with_ek.tpm, entity_type, u32(0)) == ReturnCode.NOSRK
    assert set_pointer(with_ek.tpm, ET_OWNER).code == ReturnCode.NOSRK


def test_session_opens_while_disabled_and_deactivated(owned, family):
    blob = owner_blob(owned.tpm, family)
    owned.set_flags(disable=True)
    owned.change("stclear", deactivated=True)
    assert open_code(owned.tpm, ET_OWNER_BLOB, blob) == 0


def test_what_is_no_such_blob_is_wrong_entitytype(owned, family):
    tpm = owned.tpm
    blob, of_key = owner_blob(tpm, family), key_blob(tpm, family)
    for entity_type, value in (
        (ET_OWNER_BLOB, b""),
        (ET_OWNER_BLOB, of_key),
        (ET_OWNER_BLOB, blob[:-1]),
        (ET_OWNER_BLOB, blob + b"\0"),
        (ET_OWNER_BLOB, clear_blob(public(family, 1, kind=KEY_BITS, count=1))),
        (ET_KEY_BLOB, blob),
        (ET_KEY_BLOB, of_key[:-1]),
        (ET_KEY_BLOB, u32(0)),
    ):
        assert open_code(tpm, entity_type, value, SRK) == ReturnCode.WRONG_ENTITYTYPE


def test_rows(owned, family):
    tpm = owned.tpm
    loaded_row(tpm, family)
    for value, code in (
        (u32(0), 0),
        (u32(1), ReturnCode.BADINDEX),
        (u32(4), ReturnCode.BADINDEX),
        (u32(0xFFFFFFFF), ReturnCode.BADINDEX),
        (b"\0\0\0", ReturnCode.BAD_PARAM_SIZE),
        (bytes(5), ReturnCode.BAD_PARAM_SIZE),
        (b"", ReturnCode.BAD_PARAM_SIZE),
    ):
        assert open_code(tpm, ET_ROW, value) == code


def test_dead_delegations_open_no_session(owned, family):
    tpm = owned.tpm
    blobs = [
        (ET_OWNER_BLOB, owner_blob(tpm, family), 0),
        (ET_ROW, u32(loaded_row(tpm, family)), 0),
        (ET_KEY_BLOB, key_blob(tpm, family), SRK),
    ]
    for blob in blobs:
        assert open_code(tpm, *blob) == 0
    manage(tpm, ENABLE, family, OFF, owner_oiap(tpm)).ok()
    for blob in blobs:
        assert open_code(tpm, *blob) == ReturnCode.DISABLED_CMD
    manage(tpm, ENABLE, family, ON, owner_oiap(tpm)).ok()
    create_owner(tpm, public(family, 1), increment=True).ok()
    for blob in blobs:
        assert open_code(tpm, *blob) == ReturnCode.FAMILYCOUNT
    manage(tpm, INVALIDATE, family, b"", owner_oiap(tpm)).ok()
    for blob in blobs:
        assert open_code(tpm, *blob) == ReturnCode.BADINDEX


def test_altered_blobs_are_authfail(owned, family):
    tpm = owned.tpm
    for entity_type, blob in ((ET_OWNER_BLOB, owner_blob), (ET_KEY_BLOB, key_blob)):
        good = blob(tpm, family)
        for at in (INTEGRITY_AT, INTEGRITY_AT + 20, len(good) - 1):
            altered = good[:at] + bytes([good[at] ^ 1]) + good[at + 1 :]
            code = open_code(tpm, entity_type, altered, SRK)
            assert code in (ReturnCode.AUTHFAIL, ReturnCode.WRONG_ENTITYTYPE)
        more = blob(tpm, family, 1)
        grown = more[: INTEGRITY_AT - 16] + u32(3) + more[INTEGRITY_AT - 12 :]
        assert open_code(tpm, entity_type, grown, SRK) == ReturnCode.AUTHFAIL
        # The count is looked at first.
        assert open_code(tpm, entity_type, with_count(good, 9), SRK) == ReturnCode.FAMILYCOUNT
    owned.change("permanent", tpm_proof=sha1(b"of another owner"))
    assert open_code(tpm, entity_type, good, SRK) == ReturnCode.AUTHFAIL


def test_key_blob_is_for_its_key(owned, family, signer):
    tpm = owned.tpm
    blob = key_blob(tpm, family)
    assert open_code(tpm, ET_KEY_BLOB, blob, SRK) == 0
    assert open_code(tpm, ET_KEY_BLOB, blob, signer) == ReturnCode.KEYNOTFOUND
    assert open_code(tpm, ET_KEY_BLOB, blob, EK) == ReturnCode.KEYNOTFOUND
    assert open_code(tpm, ET_KEY_BLOB, blob, 0x1234) == ReturnCode.INVALID_KEYHANDLE
    assert open_code(tpm, ET_KEY_BLOB, blob, OWNER) == ReturnCode.INVALID_RESOURCE


def test_full_table_is_resources(owned, family):
    blob = owner_blob(owned.tpm, family)
    for _ in range(16):
        by_blob(owned.tpm, blob)
    assert open_code(owned.tpm, ET_OWNER_BLOB, blob) == ReturnCode.RESOURCES


# -- each use: permissions -------------------------------------------------------------------------


def test_only_what_is_permitted(owned, family):
    tpm = owned.tpm
    blob = owner_blob(tpm, family, PUBEK_BIT)
    owner_pubek(tpm, by_blob(tpm, blob)).ok()
    answer = tpm.auth(DISABLE_PUBEK_READ, b"", by_blob(tpm, blob))
    assert answer.code == ReturnCode.AUTHFAIL
    blob = owner_blob(tpm, family, ALL_OWNER & ~PUBEK_BIT)
    assert owner_pubek(tpm, by_blob(tpm, blob)).code == ReturnCode.AUTHFAIL
    tpm.auth(DISABLE_PUBEK_READ, b"", by_blob(tpm, blob)).ok()


def test_only_what_is_permitted_of_a_key(owned, family, signer):
    tpm = owned.tpm
    blob = signer_blob(tpm, family, signer, SIGN_BIT)
    sign(tpm, signer, by_key(tpm, blob, signer)).ok()
    session = by_key(tpm, blob, signer)
    answer = tpm.auth(GET_PUB_KEY, b"", session, handles=u32(signer))
    assert answer.code == ReturnCode.AUTHFAIL
    blob = signer_blob(tpm, family, signer, ALL_KEY & ~SIGN_BIT)
    assert sign(tpm, signer, by_key(tpm, blob, signer)).code == ReturnCode.AUTHFAIL


def test_one_bit_means_another_command_for_owner_and_key(owned, family):
    # Bit 14 permits TPM_NV_DefineSpace, and of a key TPM_Sign.
    tpm = owned.tpm
    blob = owner_blob(tpm, family, 1 << 14)
    session = by_blob(tpm, blob)
    params = define_params(session)
    tpm.auth(0xCC, params, session).ok()
    session = by_key(tpm, key_blob(tpm, family, 1 << 14))
    assert tpm.auth(0xCC, define_params(session), session).code == ReturnCode.AUTHFAIL


def define_params(session):
    free = pcr_info()
    head = u16(0x18) + u32(0x1234) + free + free + u16(0x17) + u32(2) + bytes(3) + u32(8)
    return head + session.masked(AREA_AUTH)


@pytest.mark.parametrize(
    ("ordinal", "params"),
    [
        (GET_CAPABILITY_OWNER, lambda _: b""),
        (CMK_SET_RESTRICTIONS, lambda _: u32(0)),
        (CHANGE_AUTH_OWNER, lambda session: u16(4) + session.masked(ZERO) + u16(2)),
    ],
    ids=["GetCapabilityOwner", "CMK_SetRestrictions", "ChangeAuthOwner"],
)
def test_what_cannot_be_delegated(owned, family, ordinal, params):
    tpm = owned.tpm
    session = by_blob(tpm, owner_blob(tpm, family))
    assert tpm.auth(ordinal, params(session), session).code == ReturnCode.AUTHFAIL
    session = owner_osap(tpm)
    tpm.auth(ordinal, params(session), session).ok()


def test_owner_delegation_uses_no_key_and_the_reverse(owned, family, signer):
    tpm = owned.tpm
    session = by_blob(tpm, owner_blob(tpm, family))
    assert sign(tpm, signer, session).code == ReturnCode.AUTHFAIL
    session = by_key(tpm, signer_blob(tpm, family, signer), signer)
    assert owner_pubek(tpm, session).code == ReturnCode.AUTHFAIL


def test_key_delegation_uses_no_other_key(owned, family, signer):
    tpm = owned.tpm
    other, _ = loaded(tpm, signing())
    session = by_key(tpm, signer_blob(tpm, family, signer), signer)
    assert sign(tpm, other, session).code == ReturnCode.AUTHFAIL


def test_delegation_proves_no_other_entity(owned, family):
    tpm = owned.tpm
    define(tpm, 0x1000, 0x40004, 4, as_owner=True).ok()
    read = u32(0x1000) + u32(0) + u32(4)
    session = by_blob(tpm, owner_blob(tpm, family))
    assert tpm.auth(0xD0, read, session).code == ReturnCode.AUTHFAIL
    owned.change("permanent", counters={2: Counter(label=b"abcd", auth_data=ZERO, value=1)})
    session = by_blob(tpm, owner_blob(tpm, family))
    assert tpm.auth(0xDD, u32(2), session).code == ReturnCode.AUTHFAIL


def test_delegation_counts_as_osap_where_osap_is_needed(owned, family):
    tpm = owned.tpm
    session = by_blob(tpm, owner_blob(tpm, family))
    tpm.auth(CREATE_COUNTER, session.masked(AREA_AUTH) + b"cntr", session).ok()
    # And not where OIAP is: a blob's secret goes with no session that is bound elsewhere.
    sealed = key_blob(tpm, family)
    session, data = srk_osap(tpm), by_key(tpm, sealed)
    params = session.masked(DATA_AUTH) + sized(b"") + sized(b"x")
    blob = tpm.auth(SEAL, params, session, handles=u32(SRK)).ok()
    answer = tpm.auth(0x18, blob, tpm.oiap(SRK_AUTH), data, handles=u32(SRK))
    assert answer.code == ReturnCode.BAD_MODE


def test_missing_permission_of_the_second_session_is_auth2fail(owned, family, signer):
    tpm = owned.tpm
    # TPM_CertifyKey: the certifying key first, then the certified one.
    blob = signer_blob(tpm, family, signer, CERTIFY_BIT)
    without = signer_blob(tpm, family, signer, ALL_KEY & ~CERTIFY_BIT)
    handles = u32(signer) + u32(signer)

    def certify(first, second):
        sessions = [by_key(tpm, first, signer), by_key(tpm, second, signer)]
        return tpm.auth(CERTIFY_KEY, ZERO, *sessions, handles=handles).code

    assert certify(blob, blob) == 0
    assert certify(without, blob) == ReturnCode.AUTHFAIL
    assert certify(blob, without) == ReturnCode.AUTH2FAIL


def test_identity_is_made_by_two_delegates(owned, family):
    tpm = owned.tpm
    key, owner = key_blob(tpm, family, 1 << 17), owner_blob(tpm, family, 1 << 11)
    parms = key_template(0x12, parms=None).replace(u16(3) + u16(1), u16(1) + u16(2), 1)
    sessions = [by_key(tpm, key), by_blob(tpm, owner)]
    params = sessions[1].masked(KEY_AUTH) + ZERO + parms
    tpm.auth(MAKE_IDENTITY, params, *sessions).ok()
    without = owner_blob(tpm, family, ALL_OWNER & ~(1 << 11))
    sessions = [by_key(tpm, key), by_blob(tpm, without)]
    params = sessions[1].masked(KEY_AUTH) + ZERO + parms
    assert tpm.auth(MAKE_IDENTITY, params, *sessions).code == ReturnCode.AUTH2FAIL


def test_refused_use_ends_the_session_and_is_no_attack(owned, family):
    tpm = owned.tpm
    session = by_blob(tpm, owner_blob(tpm, family, DISABLE_PUBEK_BIT))
    assert owner_pubek(tpm, session).code == ReturnCode.AUTHFAIL
    assert owned.state.stclear.failed_tries == 0
    answer = tpm.auth(DISABLE_PUBEK_READ, b"", session)
    assert answer.code == ReturnCode.INVALID_AUTHHANDLE


def test_wrong_secret_is_an_attack(owned, family):
    session = by_blob(owned.tpm, owner_blob(owned.tpm, family), secret=ZERO)
    assert owner_pubek(owned.tpm, session).code == ReturnCode.AUTHFAIL
    assert owned.state.stclear.failed_tries == 1


def test_delegate_may_end_the_lockout(owned, family):
    tpm = owned.tpm
    session = by_blob(tpm, owner_blob(tpm, family, 1 << 17))
    owned.change("stclear", failed_tries=6, last_failure_us=owned.clock.us)
    tpm.auth(RESET_LOCK, b"", session).ok()
    assert owned.state.stclear.failed_tries == 0


# -- each use: PCRs, locality, restrictions --------------------------------------------------------


@pytest.mark.parametrize("kind", ["owner", "row", "key"])
def test_delegation_is_bound_to_pcrs(owned, family, signer, kind):
    tpm = owned.tpm
    info = pcr_info(10, digest=composite([10]))
    if kind == "key":
        session = by_key(tpm, signer_blob(tpm, family, signer, info=info), signer)
    elif kind == "row":
        session = by_row(tpm, loaded_row(tpm, family, info=info))
    else:
        session = by_blob(tpm, owner_blob(tpm, family, info=info))

    def use():
        return sign(tpm, signer, session) if kind == "key" else owner_pubek(tpm, session)

    use().ok()
    tpm.send(EXTEND, u32(10) + ZERO).ok()
    assert use().code == ReturnCode.WRONGPCRVAL


def test_pcrs_are_not_looked_at_in_setup(owned, family):
    info = pcr_info(10, digest=sha1(b"not now"))
    blob = owner_blob(owned.tpm, family, info=info)
    session = by_blob(owned.tpm, blob)
    assert owner_pubek(owned.tpm, session).code == ReturnCode.WRONGPCRVAL


def test_delegation_is_bound_to_localities(owned, family):
    tpm = owned.tpm
    blob = owner_blob(tpm, family, info=pcr_info(localities=1 << 2))
    assert owner_pubek(tpm, by_blob(tpm, blob)).code == ReturnCode.BAD_LOCALITY
    owner_pubek(tpm, by_blob(tpm, blob), locality=2).ok()


def test_permission_is_looked_at_before_pcrs(owned, family):
    info = pcr_info(10, digest=sha1(b"not now"))
    session = by_blob(owned.tpm, owner_blob(owned.tpm, family, 1, info=info))
    assert owner_pubek(owned.tpm, session).code == ReturnCode.AUTHFAIL


@pytest.mark.parametrize(
    ("usage", "bit"),
    [(SIGNING, 1 << 31), (0x11, 1 << 30), (0x14, 1 << 29), (0x15, 1 << 28), (0x16, 1 << 27)],
)
def test_certified_migratable_keys_are_restricted(owned, family, usage, bit):
    tpm = owned.tpm
    handle, _ = loaded(tpm, storage() if usage in (0x11, 0x16) else signing())
    make_cmk(owned, handle, usage)
    blob = signer_blob(tpm, family, handle)

    def code():
        session = by_key(tpm, blob, handle)
        return tpm.auth(GET_PUB_KEY, b"", session, handles=u32(handle)).code

    assert code() == ReturnCode.INVALID_KEYUSAGE
    owned.change("permanent", restrict_delegate=0xFFFFFFFF & ~bit)
    assert code() == ReturnCode.INVALID_KEYUSAGE
    owned.change("permanent", restrict_delegate=bit)
    assert code() == 0


def make_cmk(bench, handle, usage):
    """Let a loaded key be a certified migratable one."""
    key = bench.state.volatile.keys[handle]
    same = described(key.public, pcr_info=b"", pub_key=key.public.pub_key, enc_data=b"")
    public_part = type(same)(
        key_usage=usage,
        key_flags=0x12,
        auth_data_usage=1,
        algorithm_parms=same.algorithm_parms,
        pcr_info=b"",
        pub_key=same.pub_key,
        enc_data=b"",
    )
    cmk = LoadedKey(
        public_part,
        payload=6,
        usage_auth=KEY_AUTH,
        migration_auth=ZERO,
        prime=key.prime,
        parent_pcr_status=False,
    )
    bench.change("volatile", keys={handle: cmk})


def test_restrictions_bind_delegates_only(owned, signer):
    make_cmk(owned, signer, SIGNING)
    sign(owned.tpm, signer, owned.tpm.osap(ET_KEY, signer, KEY_AUTH)).ok()


# -- ends ------------------------------------------------------------------------------------------


def test_session_ends_with_its_key(owned, family, signer):
    tpm = owned.tpm
    blob = signer_blob(tpm, family, signer)
    session, other = by_key(tpm, blob, signer), by_key(tpm, key_blob(tpm, family))
    tpm.send(0xBA, u32(signer) + u32(1)).ok()
    assert sign(tpm, signer, session).code == ReturnCode.INVALID_KEYHANDLE
    assert session.handle not in owned.state.stany.sessions
    assert other.handle in owned.state.stany.sessions


def test_session_ends_when_the_owner_changes_the_secret(owned, family):
    tpm = owned.tpm
    session = by_blob(tpm, owner_blob(tpm, family))
    osap = owner_osap(tpm)
    tpm.auth(CHANGE_AUTH_OWNER, u16(4) + osap.masked(KEY_AUTH) + u16(2), osap).ok()
    assert owner_pubek(tpm, session).code == ReturnCode.INVALID_AUTHHANDLE


def test_delegation_outlives_a_change_of_the_owners_secret(owned, family):
    tpm = owned.tpm
    blob = owner_blob(tpm, family)
    osap = owner_osap(tpm)
    tpm.auth(CHANGE_AUTH_OWNER, u16(4) + osap.masked(KEY_AUTH) + u16(2), osap).ok()
    owner_pubek(tpm, by_blob(tpm, blob)).ok()


# -- §18.4: the owner pointer ----------------------------------------------------------------------


@pytest.fixture
def pointed(owned, family):
    """A TPM whose owner pointer points to a delegation of TPM_OwnerReadPubek and CreateCounter."""
    loaded_row(owned.tpm, family, PUBEK_BIT | 1 << 4)
    set_pointer(owned.tpm, ET_ROW, 0).ok()
    return owned


def test_pointer_lets_a_delegate_act_for_the_owner(pointed):
    tpm = pointed.tpm
    for session in (tpm.oiap(DEL_AUTH), owner_osap(tpm, DEL_AUTH)):
        owner_pubek(tpm, session).ok()
        owner_pubek(tpm, session).ok()
    session = owner_osap(tpm, DEL_AUTH)
    tpm.auth(CREATE_COUNTER, session.masked(AREA_AUTH) + b"cntr", session).ok()


def test_pointer_permits_no_more_than_the_row(pointed):
    tpm = pointed.tpm
    for ordinal in (DISABLE_PUBEK_READ, GET_CAPABILITY_OWNER):
        for session in (tpm.oiap(DEL_AUTH), owner_osap(tpm, DEL_AUTH)):
            assert tpm.auth(ordinal, b"", session).code == ReturnCode.AUTHFAIL
    assert pointed.state.stclear.failed_tries == 0


def test_pointer_takes_the_owners_secret_out_of_use(pointed):
    tpm = pointed.tpm
    for session in (tpm.oiap(OWNER_AUTH), owner_osap(tpm, OWNER_AUTH)):
        assert owner_pubek(tpm, session).code == ReturnCode.AUTHFAIL
    set_pointer(tpm, ET_OWNER, 0x55).ok()  # the value does not matter
    for session in (tpm.oiap(OWNER_AUTH), owner_osap(tpm, OWNER_AUTH)):
        owner_pubek(tpm, session).ok()


def test_pointer_leaves_open_sessions_alone(owned, family):
    tpm = owned.tpm
    loaded_row(tpm, family, PUBEK_BIT)
    owners = owner_osap(tpm)
    set_pointer(tpm, ET_ROW, 0).ok()
    delegates = owner_osap(tpm, DEL_AUTH)
    tpm.auth(GET_CAPABILITY_OWNER, b"", owners).ok()
    set_pointer(tpm, ET_OWNER).ok()
    owner_pubek(tpm, delegates).ok()
    assert tpm.auth(GET_CAPABILITY_OWNER, b"", delegates).code == ReturnCode.AUTHFAIL


def test_pointer_leaves_delegates_alone(pointed, family):
    tpm = pointed.tpm
    set_pointer(tpm, ET_OWNER).ok()
    blob = owner_blob(tpm, family, DISABLE_PUBEK_BIT)
    set_pointer(tpm, ET_ROW, 0).ok()
    tpm.auth(DISABLE_PUBEK_READ, b"", by_blob(tpm, blob)).ok()


def test_pointer_obeys_pcrs_and_localities(owned, family):
    tpm = owned.tpm
    info = pcr_info(10, digest=composite([10]), localities=2)
    loaded_row(tpm, family, info=info)
    set_pointer(tpm, ET_ROW, 0).ok()
    for open_session in (tpm.oiap, lambda secret: owner_osap(tpm, secret)):
        owner_pubek(tpm, open_session(DEL_AUTH), locality=1).ok()
        code = owner_pubek(tpm, open_session(DEL_AUTH)).code
        assert code == ReturnCode.BAD_LOCALITY
    tpm.send(EXTEND, u32(10) + ZERO).ok()
    for open_session in (tpm.oiap, lambda secret: owner_osap(tpm, secret)):
        code = owner_pubek(tpm, open_session(DEL_AUTH), locality=1).code
        assert code == ReturnCode.WRONGPCRVAL


def test_pointer_is_for_the_owner_only(pointed, signer):
    tpm = pointed.tpm
    sign(tpm, signer, tpm.oiap(KEY_AUTH)).ok()
    sign(tpm, signer, tpm.osap(ET_KEY, signer, KEY_AUTH)).ok()


def test_pointer_ends_with_the_start_up(pointed):
    pointed.power_cycle().ok()
    owner_pubek(pointed.tpm, pointed.tpm.oiap(OWNER_AUTH)).ok()


def test_pointer_refuses(owned, family):
    tpm = owned.tpm
    blob = owner_blob(tpm, family)
    for entity_type in (0, 1, 3, 4, 5, 6, ET_OWNER_BLOB, ET_KEY_BLOB, AES | ET_ROW, AES | ET_OWNER):
        assert set_pointer(tpm, entity_type, 0).code == ReturnCode.BAD_PARAMETER
    for row in (0, 4, 0xFFFFFFFF, OWNER):
        assert set_pointer(tpm, ET_ROW, row).code == ReturnCode.BADINDEX
    load_owner(tpm, 0, blob, owner_oiap(tpm)).ok()
    create_owner(tpm, public(family, 1), increment=True).ok()
    assert set_pointer(tpm, ET_ROW, 0).code == ReturnCode.FAMILYCOUNT
    manage(tpm, ENABLE, family, OFF, owner_oiap(tpm)).ok()
    assert set_pointer(tpm, ET_ROW, 0).code == ReturnCode.DISABLED_CMD
    manage(tpm, INVALIDATE, family, b"", owner_oiap(tpm)).ok()
    assert set_pointer(tpm, ET_ROW, 0).code == ReturnCode.BADINDEX
    assert owned.state.stclear.owner_reference == OWNER


def test_row_that_died_says_why(pointed):
    # Commands that end a delegation set the pointer back; a state from elsewhere may not have.
    tables = {"family_table": {}, "delegate_table": pointed.state.permanent.delegate_table}
    pointed.change("permanent", **tables)
    answer = pointed.tpm.send(0x0B, u16(ET_OWNER) + u32(OWNER) + ZERO)
    assert answer.code == ReturnCode.BADINDEX
    pointed.change("permanent", delegate_table={})
    session = pointed.tpm.oiap(DEL_AUTH)
    assert owner_pubek(pointed.tpm, session).code == ReturnCode.BADINDEX


def test_row_of_key_permissions_acts_for_no_owner(pointed):
    # No command loads such a row.
    row = pointed.state.permanent.delegate_table[0]
    permissions = replace(row.public.permissions, delegate_type=KEY_BITS)
    bad = replace(row, public=replace(row.public, permissions=permissions))
    pointed.change("permanent", delegate_table={0: bad})
    for session in (pointed.tpm.oiap(DEL_AUTH), owner_osap(pointed.tpm, DEL_AUTH)):
        assert owner_pubek(pointed.tpm, session).code == ReturnCode.AUTHFAIL


# -- the client ------------------------------------------------------------------------------------


def test_client_speaks_dsap(owned, family, signer):
    tpm = owned.tpm
    client = TpmClient(lambda request: tpm.exchange(request, 0), rng=owned.rng)
    blob = owner_blob(tpm, family)
    for adip in (0, 6):
        session = client.dsap(ET_OWNER_BLOB, blob, DEL_AUTH, adip=adip)
        out = client.call(
            Ordinal.CREATE_COUNTER, Use(session), enc_auth=session.mask(AREA_AUTH), label=u32(adip)
        )
        assert not session.is_open
        assert client.read_counter(out.count_id).counter > 0
    session = client.dsap(ET_ROW, u32(loaded_row(tpm, family)), DEL_AUTH)
    client.call(Ordinal.OWNER_READ_PUBEK, Use(session, continues=True))
    assert session.is_open
    blob = signer_blob(tpm, family, signer)
    session = client.dsap(ET_KEY_BLOB, blob, DEL_AUTH, key_handle=signer)
    out = client.call(Ordinal.SIGN, Use(session), key_handle=signer, area_to_sign=sha1(b"x"))
    assert len(out.sig) == 64


def test_answer_is_handle_and_two_nonces(owned, family):
    answer, _ = dsap_request(owned.tpm, ET_OWNER_BLOB, owner_blob(owned.tpm, family))
    assert len(answer.ok()) == 44
    assert number(answer.body[:4]) in owned.state.stany.sessions
