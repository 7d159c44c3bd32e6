"""TPM 1.2 return codes, and the exception that carries one.

Source: TPM Main r116 Part 2 §16. Names are the specification's with the `TPM_` prefix off.
"""

from __future__ import annotations

from enum import IntEnum


class ReturnCode(IntEnum):
    """TPM_RESULT. Codes with bit 0x800 are warnings: nothing changed, try again."""

    SUCCESS = 0x00
    AUTHFAIL = 0x01
    BADINDEX = 0x02
    BAD_PARAMETER = 0x03
    AUDITFAILURE = 0x04
    CLEAR_DISABLED = 0x05
    DEACTIVATED = 0x06
    DISABLED = 0x07
    DISABLED_CMD = 0x08
    FAIL = 0x09
    BAD_ORDINAL = 0x0A
    INSTALL_DISABLED = 0x0B
    INVALID_KEYHANDLE = 0x0C
    KEYNOTFOUND = 0x0D
    INAPPROPRIATE_ENC = 0x0E
    MIGRATEFAIL = 0x0F
    INVALID_PCR_INFO = 0x10
    NOSPACE = 0x11
    NOSRK = 0x12
    NOTSEALED_BLOB = 0x13
    OWNER_SET = 0x14
    RESOURCES = 0x15
    SHORTRANDOM = 0x16
    SIZE = 0x17
    WRONGPCRVAL = 0x18
    BAD_PARAM_SIZE = 0x19
    SHA_THREAD = 0x1A
    SHA_ERROR = 0x1B
    FAILEDSELFTEST = 0x1C
    AUTH2FAIL = 0x1D
    BADTAG = 0x1E
    IOERROR = 0x1F
    ENCRYPT_ERROR = 0x20
    DECRYPT_ERROR = 0x21
    INVALID_AUTHHANDLE = 0x22
    NO_ENDORSEMENT = 0x23
    INVALID_KEYUSAGE = 0x24
    WRONG_ENTITYTYPE = 0x25
    INVALID_POSTINIT = 0x26
    INAPPROPRIATE_SIG = 0x27
    BAD_KEY_PROPERTY = 0x28
    BAD_MIGRATION = 0x29
    BAD_SCHEME = 0x2A
    BAD_DATASIZE = 0x2B
    BAD_MODE = 0x2C
    BAD_PRESENCE = 0x2D
    BAD_VERSION = 0x2E
    NO_WRAP_TRANSPORT = 0x2F
    AUDITFAIL_UNSUCCESSFUL = 0x30
    AUDITFAIL_SUCCESSFUL = 0x31
    NOTRESETABLE = 0x32
    NOTLOCAL = 0x33
    BAD_TYPE = 0x34
    INVALID_RESOURCE = 0x35
    NOTFIPS = 0x36
    INVALID_FAMILY = 0x37
    NO_NV_PERMISSION = 0x38
    REQUIRES_SIGN = 0x39
    KEY_NOTSUPPORTED = 0x3A
    AUTH_CONFLICT = 0x3B
    AREA_LOCKED = 0x3C
    BAD_LOCALITY = 0x3D
    READ_ONLY = 0x3E
    PER_NOWRITE = 0x3F
    FAMILYCOUNT = 0x40
    WRITE_LOCKED = 0x41
    BAD_ATTRIBUTES = 0x42
    INVALID_STRUCTURE = 0x43
    KEY_OWNER_CONTROL = 0x44
    BAD_COUNTER = 0x45
    NOT_FULLWRITE = 0x46
    CONTEXT_GAP = 0x47
    MAXNVWRITES = 0x48
    NOOPERATOR = 0x49
    RESOURCEMISSING = 0x4A
    DELEGATE_LOCK = 0x4B
    DELEGATE_FAMILY = 0x4C
    DELEGATE_ADMIN = 0x4D
    TRANSPORT_NOTEXCLUSIVE = 0x4E
    OWNER_CONTROL = 0x4F
    DAA_RESOURCES = 0x50
    DAA_INPUT_DATA0 = 0x51
    DAA_INPUT_DATA1 = 0x52
    DAA_ISSUER_SETTINGS = 0x53
    DAA_TPM_SETTINGS = 0x54
    DAA_STAGE = 0x55
    DAA_ISSUER_VALIDITY = 0x56
    DAA_WRONG_W = 0x57
    BAD_HANDLE = 0x58
    BAD_DELEGATE = 0x59
    BADCONTEXT = 0x5A
    TOOMANYCONTEXTS = 0x5B
    MA_TICKET_SIGNATURE = 0x5C
    MA_DESTINATION = 0x5D
    MA_SOURCE = 0x5E
    MA_AUTHORITY = 0x5F
    PERMANENTEK = 0x61
    BAD_SIGNATURE = 0x62
    NOCONTEXTSPACE = 0x63
    RETRY = 0x800
    NEEDS_SELFTEST = 0x801
    DOING_SELFTEST = 0x802
    DEFEND_LOCK_RUNNING = 0x803


class TpmError(Exception):
    """A command ends with a code other than SUCCESS: the peer's fault, a value, not a crash.

    Args:
        code: What the response carries.
        reason: For logs and tests; never sent to the peer, never contains secrets.
    """

    def __init__(self, code: ReturnCode, reason: str = "") -> None:
        super().__init__(code, reason)
        self.code = code
        self.reason = reason

    def __str__(self) -> str:
        return f"TPM_{self.code.name}" + (f" ({self.reason})" if self.reason else "")
