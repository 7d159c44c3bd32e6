"""Where libtpms and we differ on purpose: what each does, and the paragraph that decides.

A difference in a scenario is covered by the deviation whose `steps` match its name ("scenario:
step", shell patterns) and whose `ordinals` (when given) have its ordinal. What differs without
being named here fails the differential test, and so does a step that is named and does not differ.
"""

from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatchcase

PERMANENT_FLAGS = bytes.fromhex("00c10000001600000065000000040000000400000108")
"""TPM_GetCapability of the permanent flags."""
ALLOW_MAINTENANCE = 21
"""Where allowMaintenance stands in its response."""


def _only_maintenance_differs(request: bytes, mine: bytes, other: bytes) -> bool:
    at = ALLOW_MAINTENANCE
    return (
        request == PERMANENT_FLAGS
        and (mine[at : at + 1], other[at : at + 1]) == (b"\x01", b"\x00")
        and mine[:at] + mine[at + 1 :] == other[:at] + other[at + 1 :]
    )


@dataclass(frozen=True, kw_only=True)
class Deviation:
    """One question with two answers.

    Attributes:
        name: Short, unique.
        commands: The commands it shows in, without TPM_.
        libtpms, ours: What each does.
        section: Where the specification speaks of it; parts of TPM Main r116.
        steps: Patterns of "scenario: step" where both were seen to differ.
        test: The test of ours that holds our answer, where no scenario shows it.
        explains: For generated sequences: whether this is all that a request and the two responses
            to it differ by.
    """

    name: str
    commands: tuple[str, ...]
    libtpms: str
    ours: str
    section: str
    steps: tuple[str, ...] = ()
    test: str = ""
    explains: Callable[[bytes, bytes, bytes], bool] | None = None

    def covers(self, scenario: str, step: str) -> bool:
        return any(fnmatchcase(f"{scenario}: {step}", pattern) for pattern in self.steps)


_MAINTENANCE = (
    "CreateMaintenanceArchive",
    "LoadMaintenanceArchive",
    "KillMaintenanceFeature",
    "LoadManuMaintPub",
    "ReadManuMaintPub",
)
_NOT_BUILT = (
    "SetRedirection",
    "GetOrdinalAuditStatus",
    "GetCapabilitySigned",
    "GetAuditEventSigned",
    "GetAuditEvent",
    "FieldUpgrade",
    "CertifySelfTest",
)

DEVIATIONS: tuple[Deviation, ...] = (
    Deviation(
        name="maintenance",
        commands=_MAINTENANCE,
        libtpms="not built: BAD_ORDINAL",
        ours="there, and optional as in the specification",
        section="Part 3 §12",
        steps=tuple(f"*: {name} *" for name in _MAINTENANCE),
    ),
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
        name="a refused TPM_SHA1Start",
        commands=("SHA1Start",),
        libtpms="ends the computation that is in progress",
        ours="changes nothing, as every refused command",
        section="Part 3 §13.1",
        steps=("*: SHA1Update 0", "*: SHA1Complete 0"),
    ),
    Deviation(
        name="owner commands without an owner",
        commands=(
            "DirWriteAuth",
            "NV_DefineSpace",
            "NV_WriteValue",
            "NV_ReadValue",
            "SetCapability",
        ),
        libtpms="looks at the session first: BADTAG, INVALID_AUTHHANDLE, AUTHFAIL",
        ours="NOSRK",
        section="Part 3 §7.2, §20.1, §20.2, §20.4, §27.3.1",
        steps=(
            "unowned: DirWriteAuth *",
            "unowned: NV_WriteValue 1",
            "unowned: NV_DefineSpace 1",
            "DIR of nobody: * as the owner",
            "tests of capability: test_set_capability_with_a_session_but_no_owner_is_nosrk",
        ),
    ),
    Deviation(
        name="sessions without an owner",
        commands=("OSAP",),
        libtpms="NOSRK",
        ours="open: an NV area or a counter has a secret of its own",
        section="Part 3 §18.2",
        steps=("unowned: OSAP *",),
    ),
    Deviation(
        name="eviction without an owner",
        commands=("EvictKey",),
        libtpms="NOSRK",
        ours="allowed: it has nothing to do with an owner",
        section="Part 3 §27.1.1",
        steps=("unowned: EvictKey *",),
    ),
    Deviation(
        name="one session for two authorizations",
        commands=(
            "ChangeAuth",
            "Unseal",
            "CertifyKey",
            "CertifyKey2",
            "CreateMigrationBlob",
            "MakeIdentity",
            "ActivateIdentity",
        ),
        libtpms="takes it for both, and the response's two new nonces leave it with the second; "
        "TPM_ChangeAuth looks at the operands before it refuses",
        ours="INVALID_AUTHHANDLE, whatever the operands are: one use spends a session's nonceEven, "
        "so such a request has no second session",
        section="Part 1 §22",
        steps=("owned: ChangeAuth 2", "one session twice: * twice"),
    ),
    Deviation(
        name="a second session that is bound to something else",
        commands=("CertifyKey", "CertifyKey2"),
        libtpms="AUTHFAIL, as for the first; AUTH2FAIL for a wrong HMAC only",
        ours="AUTH2FAIL: the authorization for the second key failed",
        section="Part 2 §16",
        steps=("pairs of sessions: *, of the first", "pairs of sessions: *, of the SRK"),
    ),
    Deviation(
        name="a second session that is not there",
        commands=("CertifyKey", "CertifyKey2"),
        libtpms="looked for when the first has proven itself: AUTHFAIL before it",
        ours="INVALID_AUTHHANDLE: sessions are found before any is checked",
        section="Part 3 §13.8, §13.9",
        steps=("pairs of sessions: *, none",),
    ),
    Deviation(
        name="bytes before an auth block",
        commands=("Sign",),
        libtpms="takes them for the block's beginning: BAD_PARAMETER where what then stands for "
        "continueAuthSession is no BOOL",
        ours="BAD_PARAM_SIZE",
        section="Part 2 §16",
        steps=("sizes: byte before a block, *",),
    ),
    Deviation(
        name="a PCR selection that ends too early",
        commands=("NV_DefineSpace", "Quote", "Quote2", "PCR_Reset", "CreateWrapKey"),
        libtpms="INVALID_PCR_INFO for a sizeOfSelect that is too large, also without the bytes",
        ours="INVALID_PCR_INFO where they are there, else BAD_PARAM_SIZE: this is no structure",
        section="Part 2 §8.1",
        steps=("sizes: select beyond, *",),
    ),
    Deviation(
        name="sealInfo that is no structure",
        commands=("Unseal",),
        libtpms="the code of the field at which reading it ends, before the sessions are checked",
        ours="sessions first, then NOTSEALED_BLOB: storedDigest does not match",
        section="Part 3 §10.2",
        steps=("sizes: sealInfo *",),
    ),
    Deviation(
        name="NV areas before TPM_Startup",
        commands=("NV_DefineSpace",),
        libtpms="defined without a start",
        ours="INVALID_POSTINIT: TPM_Startup is the only command then",
        section="Part 3 §3.1",
        steps=("before start-up: NV_DefineSpace *",),
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
        name="parentPCRStatus of a key for new secrets",
        commands=("ChangeAuthAsymStart",),
        libtpms="TRUE in certifyInfo; the signature is over that",
        ours="FALSE, as the field's description demands",
        section="Part 3 §27.4.1",
        steps=(
            "asymmetric change: start good",
            "wrapped asymmetric change: start",
            "FIPS keys: new secrets by 1024",
        ),
    ),
    Deviation(
        name="a plain migratable key that comes as a certified one",
        commands=("CMK_ConvertMigration",),
        libtpms="AUTHFAIL",
        ours="INVALID_STRUCTURE",
        section="Part 3 §11.10",
        steps=("certified keys: come plain",),
    ),
    Deviation(
        name="no slot for an old context of a key",
        commands=("LoadKeyContext",),
        libtpms="RESOURCES",
        ours="NOSPACE, as for every other key that finds no slot",
        section="Part 3 §27.2.2",
        steps=("full: load an old context",),
    ),
    Deviation(
        name="old context of a key that the owner keeps",
        commands=("SaveKeyContext",),
        libtpms="saved, and the key is gone",
        ours="OWNER_CONTROL, as TPM_SaveContext has it: only the owner lets it go",
        section="Part 3 §21.1, §21.2",
        steps=("full: save what is kept",),
    ),
    Deviation(
        name="locality of a key",
        commands=("Sign", "GetPubKey"),
        libtpms="WRONGPCRVAL for a wrong locality too",
        ours="BAD_LOCALITY: what to check and what to answer stands apart from the PCRs",
        section="Part 3 §13.8, action 9 a ii; §10.6, action 4 a ii",
        steps=(
            "tests of cryptographic: test_sign_checks_the_keys_binding",
            "tests of storage_keys: test_get_pub_key_checks_the_keys_locality",
        ),
    ),
    Deviation(
        name="order of TPM_CMK_CreateTicket",
        commands=("CMK_CreateTicket",),
        libtpms="looks at the key before it looks at the owner's proof",
        ours="the owner first, as the actions are numbered",
        section="Part 3 §11.8",
        steps=(
            "tests of migration_cmk: test_create_ticket_checks_in_the_order_of_the_specification",
        ),
    ),
    Deviation(
        name="a new secret of a delegation under OIAP",
        commands=("Delegate_CreateKeyDelegation",),
        libtpms="BAD_MODE",
        ours="INVALID_AUTHHANDLE",
        section="Part 3 §19.2, action 5",
        steps=("tests of delegation: test_oiap_session_masks_no_secret",),
    ),
    Deviation(
        name="lengths inside a delegation",
        commands=("Delegate_LoadOwnerDelegation", "Delegate_VerifyDelegation"),
        libtpms="blobSize is not compared with the blob, bytes behind one are ignored; a length "
        "that is too large is SIZE or INVALID_PCR_INFO",
        ours="BAD_PARAM_SIZE for what is no whole structure of the size that is said, before "
        "anything is done with it; what is one and was changed is AUTHFAIL",
        section="Part 3 §19.4, incoming operands (blobSize); §19.7, actions 1 and 8",
        steps=(
            "tests of delegation: test_load_refuses",
            "tests of delegation: test_verify_refuses",
            "tests of delegation: test_every_flipped_byte_of_a_delegation_is_refused",
        ),
    ),
    Deviation(
        name="delegations that end libtpms",
        commands=("Delegate_LoadOwnerDelegation", "Delegate_UpdateVerification"),
        libtpms="a row or family that is not there ends the process",
        ours="BADINDEX, AUTHFAIL",
        section="Part 3 §19.4, §19.6",
        steps=(
            "tests of delegation: test_unowned_load_refuses",
            "tests of delegation: test_update_refuses",
        ),
    ),
    Deviation(
        name="signing in a session that joins",
        commands=("DAA_Sign",),
        libtpms="noticed at stage 2 only",
        ours="DAA_ISSUER_SETTINGS at stage 1: the session knows no issuer yet",
        section="Part 3 §26.2",
        steps=("crossed DAA: 31 at 1",),
    ),
    Deviation(
        name="what is no private part of a key",
        commands=("LoadKey2",),
        libtpms="the code of the field at which reading it ends",
        ours="INVALID_STRUCTURE",
        section="Part 3 §10.5",
        steps=("keys and quotes: load what is no key",),
    ),
    Deviation(
        name="what is no key in a migration",
        commands=("CreateMigrationBlob",),
        libtpms="the second session is proven against whatever stands there: AUTH2FAIL",
        ours="INVALID_STRUCTURE",
        section="Part 3 §11.1",
        steps=("tests of migration: test_create_migration_blob_of_what_is_no_key_*",),
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
        name="order of TPM_RevokeTrust",
        commands=("RevokeTrust",),
        libtpms="asks for presence before EKReset",
        ours="EKReset first (AUTHFAIL), then presence, as the actions are numbered",
        section="Part 3 §14.3",
        steps=("endorsement: revoke none",),
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
        name="what no TPM saved",
        commands=("LoadContext",),
        libtpms="DECRYPT_ERROR where nothing can be decrypted",
        ours="BADCONTEXT for everything that is no context of this TPM",
        section="Part 3 §21.3",
        steps=(
            "owned: LoadContext 0",
            "locked out: LoadContext 0",
            "bent blobs: context of another kind",
            "tests of context: test_every_flipped_byte_is_refused",
        ),
    ),
    Deviation(
        name="a context that finds no slot",
        commands=("LoadContext",),
        libtpms="is spent: BADCONTEXT when it is loaded again",
        ours="is good for the next try, for a command that fails changes nothing",
        section="Part 3 §21.3, actions 9 and 10",
        steps=("tests of context: test_failed_load_leaves_the_context_good",),
    ),
    Deviation(
        name="the SRK's handle for a saved session of the SRK",
        commands=("LoadContext",),
        libtpms="must be given where the session was opened by TPM_ET_KEYHANDLE, and need not "
        "where it was by TPM_ET_SRK",
        ours="need not be given: there is one SRK, which is always loaded",
        section="Part 3 §21.3, action 5 a ii (2)",
        steps=("tests of context: test_srk_is_always_there*",),
    ),
    Deviation(
        name="saved sessions of what has changed",
        commands=("LoadContext", "LoadAuthContext"),
        libtpms="come back after the SRK's secret, the owner's delegations or an NV area have "
        "changed",
        ours="RESOURCEMISSING for what is no longer what it was bound to, BADCONTEXT for what was "
        "ended with the sessions in the TPM",
        section="Part 3 §17.2, action 8; §19.1; §21.3, action 5 a ii (1)",
        steps=(
            "tests of context: test_session_of_the_srk_ends_with_its_secret",
            "tests of context: test_saved_*",
            "tests of context: test_session_of_an_area_needs_that_area",
            "tests of context: test_what_ends_delegated_sessions_ends_saved_ones*",
        ),
    ),
    Deviation(
        name="saved sessions and TPM_Reset",
        commands=("LoadContext",),
        libtpms="BADCONTEXT: TPM_Reset ends saved sessions, too",
        ours="come back: what TPM_SaveContext saved must not be affected by TPM_Reset",
        section="Part 3 §27.5, action 1 b",
        steps=("contexts: a session after TPM_Reset",),
    ),
    Deviation(
        name="contexts of 1.1 and of 1.2",
        commands=("LoadKeyContext", "LoadAuthContext", "LoadContext"),
        libtpms="each loads what the other saved",
        ours="BADCONTEXT: TPM_Reset ends what the commands of 1.1 saved, and nothing else",
        section="Part 3 §27.2, §27.5",
        steps=("tests of context: test_legacy_and_new_contexts_do_not_mix",),
    ),
    Deviation(
        name="no structure of any version",
        commands=("LoadKey2", "Unseal"),
        libtpms="BAD_VERSION or another code, by which byte is wrong",
        ours="the code of the structure that the first two bytes announce",
        section="Part 2 §4.5, §5.1",
        steps=(
            "keys: load altered at 0",
            "keys: load altered at 34",
            "sealing: unseal altered at 11",
        ),
    ),
    Deviation(
        name="revision bytes",
        commands=("LoadKey2", "Unseal"),
        libtpms="the two revision bytes of STRUCT_VER are hashed as sent",
        ours="ignored on input and zero on output, so a changed byte does no harm",
        section="Part 2 §5.1",
        steps=("keys: load altered at 3", "sealing: unseal altered at 3"),
    ),
    Deviation(
        name="reserved authDataUsage",
        commands=("CreateWrapKey",),
        libtpms="any value is taken; all but 0 demand authorization",
        ours="BAD_KEY_PROPERTY",
        section="Part 2 §5.9",
        steps=("keys: make reserved authDataUsage",),
    ),
    Deviation(
        name="explicit default exponent",
        commands=("CreateWrapKey",),
        libtpms="a storage key may say 010001",
        ours="exponentSize must be 0: BAD_KEY_PROPERTY",
        section="Part 2 §10.2",
        steps=("keys: make storage with an exponent",),
    ),
    Deviation(
        name="scheme of the signer",
        commands=("CertifyKey", "CertifyKey2"),
        libtpms="looked at before the sessions",
        ours="sessions are proven first, whatever else is wrong",
        section="Part 3 §13.8, §13.9",
        steps=(
            "keys: certify 3[23] storage by DER alone",
            "keys: certify 3[23] storage by storage alone",
        ),
    ),
    Deviation(
        name="pcrIgnoredOnRead",
        commands=("CertifyKey", "CertifyKey2"),
        libtpms="PCRs of the certified key are checked all the same",
        ours="reading the public part skips them",
        section="Part 2 §5.10",
        steps=("keys: certify 3[23] ignoring", "keys: certify 3[23] ignoring alone"),
    ),
    Deviation(
        name="too much to seal",
        commands=("Seal", "Sealx"),
        libtpms="ENCRYPT_ERROR for one byte too many, BAD_DATASIZE for more",
        ours="BAD_DATASIZE",
        section="Part 3 §10.1",
        steps=("sealing: seal 150", "keys and quotes: sealx 150"),
    ),
    Deviation(
        name="write protection by locality",
        commands=("NV_DefineSpace",),
        libtpms="looks at the localities of pcrInfoRead",
        ours="looks at those of pcrInfoWrite",
        section="Part 3 §20.1",
        steps=("nv definitions: define limited *",),
    ),
    Deviation(
        name="no room in NV memory",
        commands=("NV_DefineSpace",),
        libtpms="SIZE, from its allocator",
        ours="NOSPACE",
        section="Part 3 §20.1",
        steps=("nv definitions: define much",),
    ),
    Deviation(
        name="flushing a DAA session that is not there",
        commands=("FlushSpecific",),
        libtpms="BAD_HANDLE",
        ours="BAD_PARAMETER",
        section="Part 3 §22.1",
        steps=("sessions: flush 8 of nothing",),
    ),
    Deviation(
        name="loading a context where its handle is taken",
        commands=("LoadContext",),
        libtpms="refuses, and throws out the key that has the handle",
        ours="refuses, and leaves that key alone",
        section="Part 3 §21.3",
        steps=("contexts: evict",),
    ),
    Deviation(
        name="what is no command inside a transport session",
        commands=("ExecuteTransport",),
        libtpms="BAD_ORDINAL or BAD_PARAM_SIZE for the outer command",
        ours="BAD_PARAMETER: wrappedCmd cannot be parsed",
        section="Part 3 §24.2",
        steps=(
            "transport: * wraps e6",
            "transport: unknown inside",
            "wrapped frames: wrapped, no ordinal",
            "wrapped frames: wrapped, nothing",
            "wrapped frames: wrapped, cut handle",
            "wrapped frames: wrapped, cut session",
            "bent commands: wrapped, end of the session",
        ),
    ),
    Deviation(
        name="a wrapped command that ends before its resource type",
        commands=("ExecuteTransport",),
        libtpms="BAD_PARAM_SIZE for the outer command, which ends the session",
        ours="BAD_PARAM_SIZE in the wrapped response: handles of keys are for the log only",
        section="Part 3 §24.2, actions 3 and 10",
        steps=(
            "wrapped frames: wrapped, cut kind of resource",
            "bent commands: wrapped, cut handle in the log",
        ),
    ),
    Deviation(
        name="commands inside a transport session that there are not",
        commands=("ExecuteTransport",),
        libtpms="BAD_ORDINAL in the wrapped response for those that it has a name for",
        ours="BAD_PARAMETER for all: wrappedCmd cannot be parsed",
        section="Part 3 §24.2",
        steps=("bent commands: wrapped, deleted command",),
    ),
    Deviation(
        name="handles of TPM_ReleaseTransportSigned inside a transport session",
        commands=("ExecuteTransport",),
        libtpms="none, so that who leaves the key's out of H1 gets AUTH2FAIL",
        ours="one, and NO_WRAP_TRANSPORT",
        section="Part 3 §24.2, action 2; §24.3, incoming operands",
        steps=("bent commands: wrapped, end of the session, whole",),
    ),
    Deviation(
        name="bytes behind a TPM_TRANSPORT_AUTH",
        commands=("EstablishTransport",),
        libtpms="not looked at",
        ours="BAD_PARAM_SIZE",
        section="Part 3 §24.1, action 2 d",
        steps=("wrapped frames: secret, byte behind",),
    ),
    Deviation(
        name="the log and a key that may not be used now",
        commands=("ExecuteTransport",),
        libtpms="WRONGPCRVAL for the outer command, which ends the session",
        ours="WRONGPCRVAL in the wrapped response: the log wants a loaded key and no more",
        section="Part 3 §24.2, action 10 g",
        steps=("logged keys: * bound 2",),
    ),
    Deviation(
        name="handles of TPM_ChangeAuthAsymFinish",
        commands=("ExecuteTransport",),
        libtpms="outside a transport session it has two; inside, the second is a parameter: hashed "
        "and encrypted, and not in the log",
        ours="two",
        section="Part 3 §27.4.2, incoming operands; §24.2, action 2",
        steps=("wrapped asymmetric change: finish *",),
    ),
    Deviation(
        name="wrong HMAC of a transport session",
        commands=("ExecuteTransport",),
        libtpms="AUTH2FAIL",
        ours="AUTHFAIL",
        section="Part 3 §24.2",
        steps=("transport: wrong HMAC",),
    ),
    Deviation(
        name="enabling or locking a family with neither TRUE nor FALSE",
        commands=("Delegate_Manage",),
        libtpms="any byte but 0 is TRUE",
        ours="BAD_PARAMETER",
        section="Part 2 §2.2.4",
        steps=("delegation: enable b'\\x02'", "lists: lock b'\\x02'"),
    ),
    Deviation(
        name="bytes behind a delegate row's number",
        commands=("DSAP",),
        libtpms="not looked at",
        ours="BAD_PARAM_SIZE",
        section="Part 3 §18.3",
        steps=("delegation: DSAP 8 blob", "delegation: DSAP 8 altered"),
    ),
    Deviation(
        name="bytes behind a structure",
        commands=("Seal", "Sealx", "CreateWrapKey", "DSAP", "ActivateIdentity"),
        libtpms="not looked at",
        ours="the code for what is no such structure: BADINDEX, WRONG_ENTITYTYPE, BAD_PARAM_SIZE",
        section="Part 3 §10.1, §10.7, §10.4, §18.3, §15.2",
        steps=("bent blobs: bytes *", "identities: activate 1.1 and a byte *"),
    ),
    Deviation(
        name="revision of sealed data",
        commands=("Unseal",),
        libtpms="NOTSEALED_BLOB when it was changed: storedDigest has it",
        ours="ignored, as in every TPM_STRUCT_VER, and in no digest",
        section="Part 2 §5.1",
        steps=("bent blobs: sealed [23] 1",),
    ),
    Deviation(
        name="lengths inside sealed data",
        commands=("Unseal",),
        libtpms="SIZE, from its allocator, for one that is too large",
        ours="BAD_PARAM_SIZE, as for every short buffer",
        section="Part 2 §9.1, §9.2",
        steps=("bent blobs: sealed [48] 1",),
    ),
    Deviation(
        name="size of a context",
        commands=("LoadContext",),
        libtpms="loaded though contextSize says more than there is",
        ours="BAD_PARAM_SIZE",
        section="Part 3 §21.3, incoming operands (contextSize)",
        steps=("bent blobs: context of a longer size",),
    ),
    Deviation(
        name="more to decrypt than the key has bytes",
        commands=("UnBind", "ChangeAuth", "CreateMigrationBlob", "ConvertMigrationBlob"),
        libtpms="BAD_DATASIZE; DECRYPT_ERROR for less",
        ours="DECRYPT_ERROR for both",
        section="Part 3 §10.3, §11.1, §11.2, §17.1",
        steps=("too long: *, too long",),
    ),
    Deviation(
        name="padding of PKCS #1 v1.5 that is none",
        commands=("UnBind",),
        libtpms="DECRYPT_ERROR: who may ask for many of them can decrypt with that",
        ours="random bytes that are the same each time, from OpenSSL, so that nothing is learned",
        section="Part 3 §10.3",
        steps=("too long: unbind 1.5, no padding",),
    ),
    Deviation(
        name="parameters of a public key",
        commands=(
            "AuthorizeMigrationKey",
            "CreateMigrationBlob",
            "CMK_CreateTicket",
            "KeyControlOwner",
        ),
        libtpms="read with the request: BAD_PARAM_SIZE or BAD_KEY_PROPERTY before anything else",
        ours="bytes of a length until they are needed: a changed ticket is AUTHFAIL, a key that is "
        "not the loaded one BAD_PARAMETER, and what is no parameters BAD_KEY_PROPERTY",
        section="Part 2 §10.1, §10.5; Part 3 §11.1, §21.1",
        steps=(
            "bent public keys: send algorithm",
            "bent public keys: keep algorithm",
            "bent public keys: * exponent",
        ),
    ),
    Deviation(
        name="a destination of another size than it says",
        commands=("AuthorizeMigrationKey",),
        libtpms="authorized: what is said is enough, and the modulus is not looked at",
        ours="BAD_KEY_PROPERTY: keyLength is not that of the modulus",
        section="Part 2 §10.1.1",
        steps=("bent public keys: authorize bits",),
    ),
    Deviation(
        name="a migration block that holds no key",
        commands=("ConvertMigrationBlob",),
        libtpms="the length of the private key is not looked at; the code of the field at which "
        "reading ends",
        ours="INVALID_STRUCTURE",
        section="Part 3 §11.2",
        steps=("bent public keys: arrived, *",),
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
        name="a delegated session under AES",
        commands=("DSAP",),
        libtpms="takes the blob for a row of the table: the process ends",
        ours="open",
        section="Part 3 §18.3",
        steps=("tests of delegation: test_secret_may_come_under_aes_from_a_delegate",),
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
        name="a key that is said to be sealed data",
        commands=("ChangeAuth",),
        libtpms="re-encrypted as if it were",
        ours="INVALID_STRUCTURE",
        section="Part 3 §17.1",
        steps=("new secrets: change key as data",),
    ),
    Deviation(
        name="the scheme that the owner authorized",
        commands=("CreateMigrationBlob", "CMK_CreateBlob"),
        libtpms="ignored: an authorization for one scheme serves another",
        ours="BAD_MODE when it is not the one that is asked for",
        section="Part 3 §11.1, §11.9",
        steps=(
            "migration: blob [34] [12] key",
            "tests of migration_cmk: test_cmk_create_blob_other_scheme_than_authorized_is_bad_mode",
        ),
    ),
    Deviation(
        name="a destination that nobody can decrypt for",
        commands=("MigrateKey",),
        libtpms="encrypts under an exponent of 0 or 2, and the key is lost",
        ours="ENCRYPT_ERROR",
        section="Part 3 §11.4",
        steps=("tests of migration: test_migrate_key_to_what_has_no_inverse*",),
    ),
    Deviation(
        name="family of the owner pointer",
        commands=("Delegate_Manage",),
        libtpms="wants the family of a DSAP session from any session: DELEGATE_FAMILY",
        ours="the family of the delegation in that row; the owner's own sessions have none",
        section="Part 3 §19.1, action 6b",
        steps=(
            "tests of delegation: test_changes_set_the_owner_pointer_back",
            "tests of delegation: test_delegate_by_owner_pointer_manages_its_own_family_only",
            "tests of delegation: test_owners_own_session_is_not_bound_by_the_owner_pointer",
        ),
    ),
    Deviation(
        name="lengths inside a key",
        commands=("CreateWrapKey", "LoadKey2"),
        libtpms="SIZE, from its allocator, for one that is too large",
        ours="BAD_PARAM_SIZE, as for every short buffer; BAD_KEY_PROPERTY inside the parameters, "
        "whose own length is right",
        section="Part 2 §10.2, §10.9",
        steps=(
            "bent keys: description cut to 1[02]",
            "bent keys: description cut to 24",
            "bent keys: description cut to 43",
            "bent keys: length in a *",
        ),
    ),
    Deviation(
        name="version or tag of a key",
        commands=("CreateWrapKey", "LoadKey2", "CMK_CreateKey"),
        libtpms="BAD_KEY_PROPERTY; a changed revision, which is ignored, is AUTHFAIL all the same: "
        "the digest of the key has it",
        ours="BAD_VERSION (BAD_PARAM_SIZE for what ends there); a revision is in no digest",
        section="Part 2 §5.1, §10.2, §10.3",
        steps=(
            "bent keys: description cut to 2",
            "bent keys: description 0 0",
            "bent keys: blob 0 0",
            "bent keys: key that migrates with the tag 0",
            "bent keys: key that migrates with the tag 29",
            "bent keys: revision of a blob",
        ),
    ),
    Deviation(
        name="a reserved authDataUsage",
        commands=("CreateWrapKey", "LoadKey2"),
        libtpms="made, and wants its secret",
        ours="BAD_KEY_PROPERTY",
        section="Part 2 §5.9",
        steps=("bent keys: description 10 2", "bent keys: blob 10 2"),
    ),
    Deviation(
        name="a changed size of a wrapped key",
        commands=("LoadKey2",),
        libtpms="AUTHFAIL, from the digest",
        ours="BAD_KEY_PROPERTY, which comes before the key is decrypted",
        section="Part 3 §10.5, action 3",
        steps=("bent keys: blob 25 1",),
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
        name="NV offset plus size",
        commands=("NV_ReadValue", "NV_WriteValue", "NV_ReadValueAuth", "NV_WriteValueAuth"),
        libtpms="added in 32 bits: a read past the area ends the process",
        ours="wide arithmetic, NOSPACE",
        section="Part 3 §20.2, §20.4",
        test="test_past_the_end_is_nospace",
    ),
    Deviation(
        name="a redefinition that is refused",
        commands=("NV_DefineSpace",),
        libtpms="has deleted the old area; 0.9.2 then enters failure mode",
        ours="the old area stays",
        section="Part 3 §20.1",
        test="test_define_again_that_fails_leaves_the_old_area",
    ),
    Deviation(
        name="limit on NV writes without authorization",
        commands=("NV_WriteValue",),
        libtpms="also while there is an owner",
        ours="before there is an owner",
        section="Part 3 §20.2",
        test="test_with_an_owner_nothing_is_counted",
    ),
    Deviation(
        name="an OSAP session of one fresh NV area",
        commands=("NV_ReadValueAuth", "NV_WriteValueAuth"),
        libtpms="opens another area with the same secret",
        ours="AUTHFAIL",
        section="Part 3 §18.2",
        test="test_osap_session_of_an_area_does_not_open_another_with_the_same_secret",
    ),
    Deviation(
        name="an OSAP session of another counter",
        commands=("IncrementCounter",),
        libtpms="opens a counter with the same secret, when the TPM has been started since",
        ours="AUTHFAIL",
        section="Part 3 §18.2",
        steps=("counters after a start: the other's, after a start",),
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
        name="codes of TPM_ActivateIdentity",
        commands=("ActivateIdentity",),
        libtpms="AUTHFAIL and AUTH2FAIL swapped",
        ours="first block AUTHFAIL, second AUTH2FAIL",
        section="Part 3 §15.2",
        steps=("identities: activate block [01] wrong",),
    ),
    Deviation(
        name="schemes of an EK",
        commands=("CreateEndorsementKeyPair", "CreateRevocableEK"),
        libtpms="others than its own are refused",
        ours="ignored, and the EK's own are told",
        section="Part 3 §14.1",
        test="test_create_ek_ignores_the_schemes_and_tells_its_own",
    ),
    Deviation(
        name="NV indices of general-purpose pins",
        commands=("NV_DefineSpace",),
        libtpms="an ordinary area",
        ours="BADINDEX: there are no pins",
        section="Part 2 §19.1",
        test="test_define_of_an_index_that_is_not_served",
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
        name="order of the families",
        commands=("Delegate_ReadTable",),
        libtpms="by the slot of each family",
        ours="ascending",
        section="Part 3 §19.5",
        steps=("lists: table with the third",),
    ),
    Deviation(
        name="the end of the list of audited ordinals",
        commands=("GetAuditDigest",),
        libtpms="connection commands are on it from wherever it starts",
        ours="nothing below startOrdinal",
        section="Part 3 §8.3, action 3",
        steps=("lists: audited from 4000000b",),
    ),
    Deviation(
        name="sizes inside a transport session",
        commands=("SHA1Start", "GetCapability"),
        libtpms="as outside: blocks of that size do not fit into a wrapped request",
        ours="what fits into a wrapped request",
        section="Part 3 §24.2",
        test="test_execute_sha1_blocks_fit_into_a_wrapped_request",
    ),
    Deviation(
        name="ticks",
        commands=("GetTicks",),
        libtpms="from the wall clock; a step back is failure mode",
        ours="from a monotonic clock",
        section="Part 3 §23.1",
        test="test_ticks_hold_for_longer_than_32_bits",
    ),
)


def deviation_for(scenario: str, step: str) -> Deviation | None:
    """The one that covers a difference."""
    return next((each for each in DEVIATIONS if each.covers(scenario, step)), None)


def is_explained(request: bytes, mine: bytes, other: bytes) -> bool:
    """Whether a deviation is all that two responses to one request differ by."""
    return any(each.explains and each.explains(request, mine, other) for each in DEVIATIONS)
