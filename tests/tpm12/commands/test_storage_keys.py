"""TPM_CreateWrapKey, LoadKey, LoadKey2 and GetPubKey: each code, each answer, forged keys."""

import pytest

from protocol.return_codes import ReturnCode
from tests.tpm12.conftest import SRK_AUTH
from tests.tpm12.makers import (
    AUTHCHANGE,
    BIND,
    ET_KEY,
    ET_SRK,
    IDENTITY,
    KEY_AUTH,
    LEGACY,
    LOAD_KEY,
    MIGRATABLE,
    MIGRATE,
    PCR_IGNORED,
    SIGNING,
    STORAGE,
    WRONG,
    aes_ctr,
    composite,
    decrypt,
    load,
    loaded,
    pcr_info,
    pcr_info_long,
    seal,
    sealed_parts,
    signing,
    storage,
    template,
    wrap,
)
from tests.tpm12.witness import (
    EK,
    SRK,
    ZERO,
    number,
    oaep,
    parse_key,
    parse_pubkey,
    parse_sized,
    selection,
    sha1,
    sized,
    u8,
    u16,
    u32,
)

EXTEND, CREATE_WRAP_KEY, GET_PUB_KEY, SIGN, FLUSH = 0x14, 0x1F, 0x21, 0x3C, 0xBA


# -- CreateWrapKey ---------------------------------------------------------------------------------


def test_create_wrap_key_wraps_what_the_structures_say(owned):
    wanted = signing(bits=1024)
    blob = wrap(owned.tpm, wanted).ok()
    key = parse_key(blob)
    assert key.head + key.parms == wanted[: len(key.head + key.parms)]
    assert (key.pcr_info, key.rest, len(key.modulus)) == (b"", b"", 128)
    inside = decrypt(owned.state.permanent.srk, key.enc_data)
    assert inside[:1] == b"\x01"
    assert inside[1:21] == KEY_AUTH
    assert inside[21:41] == owned.state.permanent.tpm_proof
    assert inside[41:61] == key.digest
    prime, rest = parse_sized(inside[61:])
    assert not rest
    assert len(prime) == 64
    assert number(key.modulus) % number(prime) == 0


def test_create_wrap_key_of_a_migratable_key_keeps_the_migration_secret(owned):
    key = parse_key(wrap(owned.tpm, signing(flags=MIGRATABLE), migration_auth=b"m" * 20).ok())
    assert decrypt(owned.state.permanent.srk, key.enc_data)[21:41] == b"m" * 20


def test_create_wrap_key_with_aes_adip(owned):
    tpm = owned.tpm
    session, odd = tpm.osap(0x600 | ET_SRK, SRK, SRK_AUTH), tpm.nonce()
    masks = aes_ctr(session.shared, session.even, KEY_AUTH)
    masks += aes_ctr(session.shared, odd, b"m" * 20)
    params = masks + signing(flags=MIGRATABLE)
    blob = tpm.auth(CREATE_WRAP_KEY, params, session, handles=u32(SRK), odd=[odd]).ok()
    inside = decrypt(owned.state.permanent.srk, parse_key(blob).enc_data)
    assert inside[1:41] == KEY_AUTH + b"m" * 20


def test_create_wrap_key_ends_its_session(owned):
    tpm = owned.tpm
    session, odd = tpm.osap(ET_SRK, SRK, SRK_AUTH), tpm.nonce()
    params = session.masked(KEY_AUTH) + session.masked(ZERO, odd) + signing()
    tpm.auth(CREATE_WRAP_KEY, params, session, handles=u32(SRK), odd=[odd]).ok()
    assert not session.continues
    assert owned.state.stany.sessions == {}


def test_create_wrap_key_fills_in_the_creation_fields(owned):
    tpm = owned.tpm
    value = tpm.send(EXTEND, u32(8) + b"e" * 20).ok()
    info = pcr_info_long([8], [9], at_creation=0x1F, localities=0x03)
    key = parse_key(wrap(tpm, signing(key12=True, pcr_info=info)).ok())
    creation = composite([8], [value])
    expected = u16(6) + u8(0x01) + info[3:-40] + creation + info[-20:]
    assert key.pcr_info == expected
    old = parse_key(wrap(tpm, signing(pcr_info=pcr_info(8, size=2))).ok())
    assert old.pcr_info[-20:] == composite([8], [value], size=2)


def test_create_wrap_key_of_an_empty_selection_has_zero_digests(owned):
    key = parse_key(wrap(owned.tpm, signing(pcr_info=selection() + b"r" * 20 + b"c" * 20)).ok())
    assert key.pcr_info == selection() + b"r" * 20 + ZERO


_GOOD = {
    "signing with SHA1": signing(2),
    "signing with DER": signing(3),
    "signing with INFO": signing(4),
    "KEY12": signing(key12=True),
    "storage": storage(),
    "bind with OAEP": template(BIND, 3, 1),
    "bind with PKCS#1": template(BIND, 2, 1),
    "legacy with PKCS#1": template(LEGACY, 2, 3),
    "legacy with OAEP": template(LEGACY, 3, 2),
    "migrate": template(MIGRATE, 3, 1, bits=2048),
    "never authorized": signing(auth_data_usage=0),
    "readable": signing(auth_data_usage=3),
    "smallest exponent": signing(exponent=b"\3"),
    "explicit exponent": signing(exponent=b"\1\0\1"),
    "exponent 17": signing(exponent=b"\0\0\0\x11"),
    "528 bits": signing(bits=528),
}


@pytest.mark.parametrize("wanted", _GOOD.values(), ids=_GOOD)
def test_create_wrap_key_makes_keys_that_load(owned, wanted):
    handle, key = loaded(owned.tpm, wanted)
    assert owned.state.volatile.keys[handle].public.pub_key == key.modulus
    assert len(key.modulus) * 8 == number(key.parms[12:16])
    assert key.modulus[0] & 0x80


_NO_PROPERTY = {
    "no usage": template(0x00, 1, 2),
    "usage above the last": template(0x17, 1, 2),
    "signing that encrypts": template(SIGNING, 3, 2),
    "signing without scheme": template(SIGNING, 1, 1),
    "storage that signs": template(STORAGE, 3, 2, bits=2048),
    "storage with PKCS#1": template(STORAGE, 2, 1, bits=2048),
    "storage of 1024 bits": template(STORAGE, 3, 1, bits=1024),
    "storage with an exponent": storage(exponent=b"\1\0\1"),
    "migrate of 1024 bits": template(MIGRATE, 3, 1, bits=1024),
    "migrate with an exponent": template(MIGRATE, 3, 1, bits=2048, exponent=b"\3"),
    "bind that signs": template(BIND, 3, 2),
    "legacy with INFO": template(LEGACY, 2, 4),
    "legacy without encryption": template(LEGACY, 1, 2),
    "not RSA": signing(algorithm=6),
    "496 bits": signing(bits=496),
    "2064 bits": signing(bits=2064),
    "520 bits, no multiple of 16": signing(bits=520),
    "three primes": signing(primes=3),
    "exponent 9": signing(exponent=b"\x09"),
    "exponent 2": signing(exponent=b"\x02"),
    "unknown flag": signing(flags=0x20),
    "reserved authDataUsage": signing(auth_data_usage=2),
    "fill of a KEY12": b"\x00\x28\x00\x01" + signing(key12=True)[4:],
}


@pytest.mark.parametrize("wanted", _NO_PROPERTY.values(), ids=_NO_PROPERTY)
def test_create_wrap_key_refuses_properties(owned, wanted):
    assert wrap(owned.tpm, wanted).code == ReturnCode.BAD_KEY_PROPERTY


_BAD_STRUCTURE = {
    "version": (b"\x01\x02\x00\x00" + signing()[4:], ReturnCode.BAD_VERSION),
    "tag": (b"\x00\x29\x00\x00" + signing()[4:], ReturnCode.BAD_VERSION),
    "selection of 4 bytes": (
        signing(pcr_info=selection(1, size=4) + ZERO + ZERO),
        ReturnCode.INVALID_PCR_INFO,
    ),
    "short PCR_INFO": (signing(pcr_info=selection(1) + ZERO), ReturnCode.BAD_PARAM_SIZE),
    "long PCR_INFO": (signing(pcr_info=pcr_info(1) + b"x"), ReturnCode.BAD_PARAM_SIZE),
    "PCR_INFO in a KEY12": (
        signing(key12=True, pcr_info=pcr_info(1)),
        ReturnCode.INVALID_STRUCTURE,
    ),
    "no locality": (
        signing(key12=True, pcr_info=pcr_info_long([1], [1], localities=0)),
        ReturnCode.INVALID_STRUCTURE,
    ),
}


@pytest.mark.parametrize(("wanted", "code"), _BAD_STRUCTURE.values(), ids=_BAD_STRUCTURE)
def test_create_wrap_key_refuses_malformed_structures(owned, wanted, code):
    assert wrap(owned.tpm, wanted).code == code


@pytest.mark.parametrize(
    "wanted",
    [
        template(IDENTITY, 1, 2, bits=2048),
        template(AUTHCHANGE, 3, 1),
        signing(flags=0x10),
        signing(flags=0x12),
    ],
    ids=["identity", "authchange", "certified", "certified migratable"],
)
def test_create_wrap_key_leaves_kinds_to_other_commands(owned, wanted):
    assert wrap(owned.tpm, wanted).code == ReturnCode.INVALID_KEYUSAGE


def test_create_wrap_key_under_a_parent_that_is_not_for_storage(owned):
    handle, _ = loaded(owned.tpm, signing())
    answer = wrap(owned.tpm, signing(), parent=handle, parent_auth=KEY_AUTH)
    assert answer.code == ReturnCode.INVALID_KEYUSAGE


def test_create_wrap_key_under_a_migratable_parent_must_be_migratable(owned):
    handle, _ = loaded(owned.tpm, storage(flags=MIGRATABLE))
    parent = {"parent": handle, "parent_auth": KEY_AUTH}
    assert wrap(owned.tpm, signing(), **parent).code == ReturnCode.INVALID_KEYUSAGE
    wrap(owned.tpm, signing(flags=MIGRATABLE), **parent).ok()


def test_create_wrap_key_sessions(owned):
    tpm, params = owned.tpm, ZERO + ZERO + signing()
    handles = u32(SRK)
    oiap = tpm.auth(CREATE_WRAP_KEY, params, tpm.oiap(SRK_AUTH), handles=handles)
    assert oiap.code == ReturnCode.BAD_MODE
    wrong = tpm.auth(CREATE_WRAP_KEY, params, tpm.osap(ET_SRK, SRK, WRONG), handles=handles)
    assert wrong.code == ReturnCode.AUTHFAIL
    handle, _ = loaded(tpm, storage())
    other = tpm.auth(CREATE_WRAP_KEY, params, tpm.osap(ET_KEY, handle, KEY_AUTH), handles=handles)
    assert other.code == ReturnCode.AUTHFAIL
    unknown = tpm.osap(ET_SRK, SRK, SRK_AUTH)
    answer = tpm.auth(CREATE_WRAP_KEY, params, unknown, handles=u32(0x1234))
    assert answer.code == ReturnCode.INVALID_KEYHANDLE


@pytest.mark.parametrize(
    "wanted",
    [signing(bits=512), signing(bits=1024, auth_data_usage=0), template(LEGACY, 3, 2, bits=1024)],
    ids=["short", "never authorized", "legacy"],
)
def test_create_wrap_key_in_fips_mode(owned, wanted):
    owned.set_flags(fips=True)
    session, odd = owned.tpm.osap(0x600 | ET_SRK, SRK, SRK_AUTH), owned.tpm.nonce()
    send = [CREATE_WRAP_KEY, ZERO + ZERO + wanted, session]
    answer = owned.tpm.auth(*send, handles=u32(SRK), odd=[odd])
    assert answer.code == ReturnCode.NOTFIPS


# -- LoadKey2 and LoadKey --------------------------------------------------------------------------


@pytest.mark.parametrize("ordinal", [LOAD_KEY, 0x41], ids=["LoadKey", "LoadKey2"])
def test_load_key_gives_a_handle_in_or_outside_the_digest(owned, ordinal):
    # The witness checks the response's HMAC, with the handle in its place or without.
    blob = wrap(owned.tpm, signing()).ok()
    handle = number(load(owned.tpm, blob, ordinal=ordinal).ok())
    key = owned.state.volatile.keys[handle]
    assert key.usage_auth == KEY_AUTH
    assert not key.parent_pcr_status
    assert not owned.last.permanent_changed


def test_load_key_survives_only_until_power_goes(owned):
    handle, _ = loaded(owned.tpm, signing())
    assert handle in owned.state.volatile.keys
    owned.power_cycle().ok()
    assert owned.state.volatile.keys == {}


def test_load_key_inherits_the_parents_pcr_status(owned):
    free, _ = loaded(owned.tpm, storage(pcr_info=pcr_info()))
    bound, _ = loaded(owned.tpm, storage(pcr_info=pcr_info(10)))
    child, _ = loaded(owned.tpm, storage(), parent=bound, parent_auth=KEY_AUTH)
    grandchild, _ = loaded(owned.tpm, signing(), parent=child, parent_auth=KEY_AUTH)
    unbound, _ = loaded(owned.tpm, signing(), parent=free, parent_auth=KEY_AUTH)
    keys = owned.state.volatile.keys
    status = [keys[h].parent_pcr_status for h in (bound, child, grandchild, unbound)]
    assert status == [False, True, True, False]


def test_load_key_under_a_parent_without_authorization(owned):
    tpm = owned.tpm
    handle, _ = loaded(tpm, storage(auth_data_usage=0))
    blob = wrap(tpm, signing(), parent=handle, parent_auth=KEY_AUTH).ok()
    tpm.send(0x41, u32(handle) + blob).ok()
    assert tpm.send(0x41, u32(SRK) + blob).code == ReturnCode.AUTHFAIL


def test_load_key_under_a_parent_that_is_not_for_storage(owned):
    handle, _ = loaded(owned.tpm, template(BIND, 3, 1, bits=2048))
    blob = wrap(owned.tpm, signing()).ok()
    answer = load(owned.tpm, blob, parent=handle, parent_auth=KEY_AUTH)
    assert answer.code == ReturnCode.INVALID_KEYUSAGE


def test_load_key_under_another_parent_does_not_decrypt(owned):
    handle, _ = loaded(owned.tpm, storage())
    blob = wrap(owned.tpm, signing()).ok()
    answer = load(owned.tpm, blob, parent=handle, parent_auth=KEY_AUTH)
    assert answer.code == ReturnCode.DECRYPT_ERROR


_ALTERED = {
    "version": (0, ReturnCode.BAD_VERSION),
    "usage": (5, ReturnCode.BAD_KEY_PROPERTY),
    "unknown flag": (8, ReturnCode.BAD_KEY_PROPERTY),
    "exponent size": (34, ReturnCode.BAD_KEY_PROPERTY),
    "modulus": (60, ReturnCode.BAD_PARAMETER),
    "encData": (-3, ReturnCode.DECRYPT_ERROR),
}


@pytest.mark.parametrize(("at", "code"), _ALTERED.values(), ids=_ALTERED)
def test_load_key_tells_what_was_altered(owned, at, code):
    blob = bytearray(wrap(owned.tpm, signing()).ok())
    blob[at] ^= 1
    assert load(owned.tpm, bytes(blob)).code == code


@pytest.mark.parametrize(("at", "bits"), [(9, MIGRATABLE), (10, 1)], ids=["flags", "authDataUsage"])
def test_load_key_with_an_altered_property_is_authfail_but_no_attack(owned, at, bits):
    blob = bytearray(wrap(owned.tpm, signing()).ok())
    blob[at] ^= bits
    assert load(owned.tpm, bytes(blob)).code == ReturnCode.AUTHFAIL
    assert owned.state.stclear.failed_tries == 0


class Forger:
    """Makes wrapped keys as anyone can who knows the parent's public part."""

    def __init__(self, bench):
        self.bench = bench
        self.key = parse_key(wrap(bench.tpm, signing(key12=True, flags=MIGRATABLE)).ok())
        self.srk = bench.state.permanent.srk
        inside = decrypt(self.srk, self.key.enc_data)
        self.prime, _ = parse_sized(inside[61:])

    def forged(self, *, payload=1, flags=None, usage=None, migration=ZERO, **parts):
        head = bytearray(self.key.head)
        if flags is not None:
            head[6:10] = u32(flags)
        if usage is not None:
            head[4:6] = u16(usage)
        if not parts.get("key12", True):
            head[:4] = b"\x01\x01\x00\x00"
        parms = parts.get("parms", self.key.parms)
        modulus = parts.get("modulus", self.key.modulus)
        public = bytes(head) + parms + sized(b"") + sized(modulus)
        secrets = u8(payload) + KEY_AUTH + migration + sha1(public)
        inside = parts.get("inside", secrets + sized(parts.get("prime", self.prime)))
        return public + sized(oaep(self.srk.public.pub_key, inside))

    def code(self, **parts):
        return load(self.bench.tpm, self.forged(**parts)).code


@pytest.fixture
def forger(owned):
    return Forger(owned)


def test_load_key_takes_a_key_that_was_wrapped_outside(forger):
    assert forger.code() == ReturnCode.SUCCESS


def test_load_key_of_what_does_not_go_together(forger):
    assert forger.code(flags=0) == ReturnCode.INVALID_KEYUSAGE  # not with our tpmProof
    proof = forger.bench.state.permanent.tpm_proof
    assert forger.code(flags=0, migration=proof) == ReturnCode.SUCCESS
    assert forger.code(inside=b"\1" * 30) == ReturnCode.INVALID_STRUCTURE
    assert forger.code(prime=b"") == ReturnCode.BAD_PARAMETER


@pytest.mark.parametrize("payload", [0, 2, 3, 4, 5, 8, 0x80, 0xFF])
def test_load_key_of_another_payload(forger, payload):
    assert forger.code(payload=payload) == ReturnCode.INVALID_STRUCTURE


@pytest.mark.parametrize("payload", [6, 7])
def test_load_key_of_a_certified_migratable_key(forger, payload):
    both = MIGRATABLE | 0x10
    assert forger.code(payload=payload, flags=both) == ReturnCode.SUCCESS
    assert forger.code(payload=payload, flags=MIGRATABLE) == ReturnCode.INVALID_KEYUSAGE
    code = forger.code(payload=payload, flags=both, key12=False)
    assert code == ReturnCode.INVALID_STRUCTURE


def test_load_key_of_a_migratable_identity_or_an_authchange_key(owned):
    identity = template(IDENTITY, 1, 2, bits=2048)
    forger = Forger(owned)
    forger.key = parse_key(wrap(owned.tpm, storage(key12=True, flags=MIGRATABLE)).ok())
    forger.prime, _ = parse_sized(decrypt(forger.srk, forger.key.enc_data)[61:])
    parms = parse_key(identity).parms
    proof = owned.state.permanent.tpm_proof
    assert forger.code(usage=IDENTITY, parms=parms) == ReturnCode.INVALID_KEYUSAGE
    ours = {"usage": IDENTITY, "parms": parms, "flags": 0, "migration": proof}
    assert forger.code(**ours) == ReturnCode.SUCCESS
    assert forger.code(usage=AUTHCHANGE) == ReturnCode.INVALID_KEYUSAGE


def _product(p, q, size=64):
    return {"modulus": (p * q).to_bytes(size, "big"), "prime": p.to_bytes(32, "big")}


_TOP = 3 << 254
_BAD_NUMBERS = {
    "even prime": _product(_TOP | 2, _TOP | 1),
    "even other prime": _product(_TOP | 1, _TOP | 2),
    "square": _product(_TOP | 1, _TOP | 1),
    "prime 1": {"prime": b"\1"},
    "prime 0": {"prime": bytes(32)},
    "modulus with a zero bit on top": _product(1 << 254 | 1, 1 << 255 | 1),
    "modulus of another size": _product(_TOP | 1, 3 << 318 | 1, size=72),
    "no modulus": {"modulus": b""},
    "prime is the modulus": {"prime": b"\xff" * 64, "modulus": b"\xff" * 64},
}


@pytest.mark.parametrize("numbers", _BAD_NUMBERS.values(), ids=_BAD_NUMBERS)
def test_load_key_with_numbers_that_are_no_key(forger, numbers):
    assert forger.code(**numbers) == ReturnCode.BAD_PARAMETER


def test_load_key_of_composites_computes_nonsense_and_nothing_worse(forger):
    tpm = forger.bench.tpm
    codes = set()
    for offset in range(1, 40, 2):
        answer = load(tpm, forger.forged(**_product(_TOP | offset, _TOP | offset + 1000)))
        codes.add(answer.code)
        if answer.code == ReturnCode.SUCCESS:
            tpm.auth(SIGN, sized(b"d" * 20), tpm.oiap(KEY_AUTH).ending(), handles=answer.body).ok()
            tpm.send(FLUSH, answer.body + u32(1)).ok()
    # The exponent fits some of these products and others not.
    assert codes == {ReturnCode.SUCCESS, ReturnCode.BAD_PARAMETER}


def test_sealed_data_is_no_key_though_its_layout_is_the_same(owned):
    """SEALED_DATA reads as a STORE_ASYMKEY that knows tpmProof; the payload refuses it."""
    forger = Forger(owned)
    blob = seal(owned.tpm, forger.prime).ok()
    _, enc_data = sealed_parts(blob)
    public = forger.key.head + forger.key.parms + sized(b"") + sized(forger.key.modulus)
    assert load(owned.tpm, public + sized(enc_data)).code == ReturnCode.AUTHFAIL
    inside = b"\x05" + decrypt(forger.srk, enc_data)[1:41] + sha1(public) + sized(forger.prime)
    assert forger.code(inside=inside) == ReturnCode.INVALID_STRUCTURE


def test_load_key_needs_a_free_slot(owned):
    blob = wrap(owned.tpm, signing()).ok()
    slots = 20
    handles = [load(owned.tpm, blob).ok() for _ in range(slots)]
    assert len(set(handles)) == slots
    assert load(owned.tpm, blob).code == ReturnCode.NOSPACE
    owned.tpm.send(FLUSH, handles[0] + u32(1)).ok()
    load(owned.tpm, blob).ok()


def test_load_key_counts_owner_evict_keys(owned):
    handle, _ = loaded(owned.tpm, signing())
    key = owned.state.volatile.keys[handle]
    owned.change("permanent", owner_evict_keys=dict.fromkeys(range(1, 20), key))
    blob = wrap(owned.tpm, signing()).ok()
    assert load(owned.tpm, blob).code == ReturnCode.NOSPACE


# -- GetPubKey -------------------------------------------------------------------------------------


def get_pub_key(tpm, handle, secret=KEY_AUTH, **more):
    return tpm.auth(GET_PUB_KEY, b"", tpm.oiap(secret).ending(), handles=u32(handle), **more)


def test_get_pub_key_gives_the_public_part(owned):
    handle, key = loaded(owned.tpm, signing(exponent=b"\3"))
    assert get_pub_key(owned.tpm, handle).ok() == key.pubkey
    assert get_pub_key(owned.tpm, handle, WRONG).code == ReturnCode.AUTHFAIL


@pytest.mark.parametrize(
    ("usage", "code"),
    [(0, ReturnCode.SUCCESS), (1, ReturnCode.AUTHFAIL), (3, ReturnCode.SUCCESS)],
)
def test_get_pub_key_without_a_session(owned, usage, code):
    handle, _ = loaded(owned.tpm, signing(auth_data_usage=usage))
    assert owned.tpm.send(GET_PUB_KEY, u32(handle)).code == code


def test_get_pub_key_of_the_srk_needs_read_srk_pub(owned):
    answer = get_pub_key(owned.tpm, SRK, SRK_AUTH)
    assert answer.code == ReturnCode.INVALID_KEYHANDLE
    owned.set_flags(read_srk_pub=True)
    _, modulus, rest = parse_pubkey(get_pub_key(owned.tpm, SRK, SRK_AUTH).ok())
    assert (modulus, rest) == (owned.state.permanent.srk.public.pub_key, b"")


@pytest.mark.parametrize("handle", [0, 0x1234, 0x40000007, 0xFFFFFFFF])
def test_get_pub_key_of_a_handle_without_key(owned, handle):
    assert get_pub_key(owned.tpm, handle).code == ReturnCode.INVALID_KEYHANDLE


@pytest.mark.parametrize("handle", range(0x40000001, 0x40000006))
def test_reserved_handles_are_no_keys(owned, handle):
    assert get_pub_key(owned.tpm, handle).code == ReturnCode.INVALID_RESOURCE


def test_ek_is_found_by_no_handle(owned):
    assert get_pub_key(owned.tpm, EK).code == ReturnCode.KEYNOTFOUND


def test_get_pub_key_checks_the_keys_pcrs_unless_ignored(owned):
    tpm = owned.tpm
    info = pcr_info(10)
    bound, _ = loaded(tpm, signing(pcr_info=info))
    ignoring, _ = loaded(tpm, signing(pcr_info=info, flags=PCR_IGNORED))
    get_pub_key(tpm, bound).ok()
    tpm.send(EXTEND, u32(10) + ZERO).ok()
    assert get_pub_key(tpm, bound).code == ReturnCode.WRONGPCRVAL
    get_pub_key(tpm, ignoring).ok()


def test_get_pub_key_checks_the_keys_locality(owned):
    info = pcr_info_long([], [10], localities=0x04)
    handle, _ = loaded(owned.tpm, signing(key12=True, pcr_info=info))
    assert get_pub_key(owned.tpm, handle, locality=0).code == ReturnCode.BAD_LOCALITY
    get_pub_key(owned.tpm, handle, locality=2).ok()
