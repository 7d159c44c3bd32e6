"""Where libtpms and we differ: start-up, self-test, opt-in, capabilities, audit.

TPM Main r116 Part 3, chapters 3 to 8.
"""

from tests.differential.deviations.deviation import Deviation

PERMANENT_FLAGS = bytes.fromhex("00c10000001600000065000000040000000400000108")
"""TPM_GetCapability of the permanent flags."""
ALLOW_MAINTENANCE = 21
"""Where allowMaintenance stands in its response."""
_NOT_BUILT = (
    "SetRedirection",
    "GetOrdinalAuditStatus",
    "GetCapabilitySigned",
    "GetAuditEventSigned",
    "GetAuditEvent",
    "FieldUpgrade",
    "CertifySelfTest",
)


def _only_maintenance_differs(request: bytes, mine: bytes, other: bytes) -> bool:
    at = ALLOW_MAINTENANCE
    return (
        request == PERMANENT_FLAGS
        and (mine[at : at + 1], other[at : at + 1]) == (b"\x01", b"\x00")
        and mine[:at] + mine[at + 1 :] == other[:at] + other[at + 1 :]
    )


DEVIATIONS: tuple[Deviation, ...] = (
    Deviation(
        name="tag of an error",
        commands=_NOT_BUILT,
        libtpms="BAD_ORDINAL under the response tag that fits the request's",
        ours="every error has the tag TPM_TAG_RSP_COMMAND",
        section="Part 1 §22",
        steps=tuple(f"*: {name} [12]" for name in _NOT_BUILT),
    ),
    Deviation(
        name="TPM_Init as a command",
        commands=("Init",),
        libtpms="BADTAG with sessions",
        ours="BAD_ORDINAL: it is a signal of the platform",
        section="Part 3 §3.1",
        steps=("*: Init [12]", "capabilities: 1 00000097"),
    ),
    Deviation(
        name="commands audited as shipped",
        commands=("GetAuditDigest", "SetOrdinalAuditStatus"),
        libtpms="the maintenance commands, which it lacks, are not on its list",
        ours="the list has them",
        section="Part 3 §8.2",
        steps=("*: GetAuditDigest 0",),
    ),
    Deviation(
        name="TPM_SetCapability of an unknown area",
        commands=("SetCapability",),
        libtpms="BAD_MODE",
        ours="BAD_PARAMETER",
        section="Part 3 §7.2, action 4",
        steps=(
            "*: SetCapability 0",
            "set capabilities: *: 8 *",
            "set capabilities: *: 9 *",
            "set capabilities: *: 10 *",
        ),
    ),
    Deviation(
        name="SRK of three primes",
        commands=("TakeOwnership",),
        libtpms="taken, and made of two",
        ours="BAD_KEY_PROPERTY",
        section="Part 3 §6.1",
        steps=("SRK of three primes: take",),
    ),
    Deviation(
        name="owner secret of 21 bytes",
        commands=("TakeOwnership",),
        libtpms="DECRYPT_ERROR",
        ours="BAD_KEY_PROPERTY, as for one of 19",
        section="Part 3 §6.1",
        steps=("owner secret of 21 bytes: take",),
    ),
    Deviation(
        name="allowMaintenance after a clear",
        commands=("OwnerClear", "ForceClear", "RevokeTrust"),
        libtpms="FALSE, for it has no maintenance",
        ours="TRUE, the default",
        section="Part 2 §7.1",
        steps=(
            "*: revoked: flags 108",
            "*: cleared: flags 108",
            "*: again: flags 108",
            "a BIOS: * capability 4 00000108",
            "verified boot: * capability 4 00000108",
        ),
        explains=_only_maintenance_differs,
    ),
    Deviation(
        name="would such a key fit?",
        commands=("GetCapability",),
        libtpms="TPM_CAP_CHECK_LOADED says yes to RSA of 4096 bits, which it cannot load",
        ours="no",
        section="Part 2 §21.1",
        steps=("capabilities: 8 *",),
    ),
    Deviation(
        name="length of a subCap",
        commands=("GetCapability",),
        libtpms="DA_LOGIC takes any subCap; SELECT_SIZE judges the first bytes of a short one",
        ours="refused for its length (BAD_MODE; a structure: BAD_PARAM_SIZE)",
        section="Part 3 §7.1",
        steps=(
            "capabilities: 19 *",
            "capabilities: 18 00",
            "capabilities: 18 0001",
            "capabilities: 18 0000000000",
        ),
    ),
    Deviation(
        name="order of TPM_SetCapability",
        commands=("SetCapability",),
        libtpms="single flags look at the owner and at the value before they look at who asks",
        ours="who may set it is asked first, as in the table",
        section="Part 2 §7.1, Part 3 §7.2",
        steps=("set capabilities: * 12: 1 00000002 01", "set capabilities: owner 16: *"),
    ),
    Deviation(
        name="TPM_Startup of an unknown type",
        commands=("Startup",),
        libtpms="BAD_PARAMETER, but the TPM has started",
        ours="BAD_PARAMETER, and it has not",
        section="Part 3 §3.2",
        steps=("start-up: start 0: *", "start-up: pcr 10 0"),
    ),
    Deviation(
        name="TPM_Startup in failure mode",
        commands=("Startup",),
        libtpms="INVALID_POSTINIT, so that a dead TPM looks like one that has been started",
        ours="FAILEDSELFTEST, which a TPM without state to resume returns to all later commands",
        section="Part 3 §3.2, on ST_STATE, a",
        steps=("start-up: start while failed", "failed: Startup *", "a kernel: * start 1"),
    ),
    Deviation(
        name="TPM_Startup that cannot be read",
        commands=("Startup",),
        libtpms="BAD_PARAM_SIZE, but the TPM has started, and saved state is gone",
        ours="BAD_PARAM_SIZE, and nothing has happened",
        section="Part 3 §3.2",
        steps=("bent commands: resume after that", "bent commands: has not started"),
    ),
    Deviation(
        name="the maker's capability in failure mode",
        commands=("GetCapability",),
        libtpms="looked for: BAD_MODE",
        ours="FAILEDSELFTEST: it is not of the subset that a failed TPM still tells",
        section="Part 3 §7.1",
        steps=("failed: capability of the maker",),
    ),
    Deviation(
        name="auditing an ordinal that is not there",
        commands=("SetOrdinalAuditStatus",),
        libtpms="BAD_PARAMETER, and success where it is not to be audited",
        ours="BADINDEX",
        section="Part 3 §8.5",
        steps=("auditing: audit 7777 1", "auditing: audit 26 [01]"),
    ),
    Deviation(
        name="whether such a key can be loaded",
        commands=("GetCapability",),
        libtpms="there is room for three primes and for 16 million bits, bytes behind the "
        "parameters are ignored, and no algorithm is one that is not served",
        ours="no room for what TPM_LoadKey2 refuses; BAD_PARAM_SIZE for bytes behind, "
        "BAD_KEY_PROPERTY for parameters that are not those of an RSA key",
        section="Part 2 §21.1, TPM_CAP_CHECK_LOADED",
        steps=("bent values: loaded *",),
    ),
    Deviation(
        name="a flag that is neither 0 nor 1",
        commands=("SetCapability", "KeyControlOwner"),
        libtpms="any byte but 0 is TRUE",
        ours="BAD_PARAMETER",
        section="Part 2 §2.2.4",
        steps=(
            "bent values: flag 20 2",
            "bent public keys: flag of a start 2",
            "bent public keys: keep with 2",
        ),
    ),
    Deviation(
        name="installing an owner where there is one",
        commands=("SetCapability",),
        libtpms="OWNER_SET",
        ours="AUTHFAIL while nobody is present: who may is looked at first",
        section="Part 3 §7.2",
        steps=("bent values: flag 2 2",),
    ),
    Deviation(
        name="renewing the DAA secrets",
        commands=("SetCapability",),
        libtpms="anybody may, which destroys every DAA credential",
        ours="the owner",
        section="Part 2 §7.4",
        test="test_daa_secrets_are_renewed_by_the_owner_only",
    ),
    Deviation(
        name="order of the NV indices",
        commands=("GetCapability",),
        libtpms="by the slot of each area",
        ours="ascending",
        section="Part 2 §21.1",
        test="test_nv_list_and_index",
    ),
    Deviation(
        name="the end of the list of audited ordinals",
        commands=("GetAuditDigest",),
        libtpms="connection commands are on it from wherever it starts",
        ours="nothing below startOrdinal",
        section="Part 3 §8.3, action 3",
        steps=("lists: audited from 4000000b",),
    ),
)
