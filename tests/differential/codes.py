"""Which return codes of which commands were compared with swtpm, and why the others cannot be.

What the engine's tests reach is recorded (`tests/vectors/reached.json`). Each (command, code) of it
was agreed on in `agreed.json`, or is our side of a named deviation there, or stands here: in
`ONLY_OURS` with the reason why swtpm cannot be brought to it.
"""

from dataclasses import dataclass, field

from tests.conformance.reached import NAMES, reached
from tests.differential.comparison import recorded

NO_MAINTENANCE = "libtpms is built without maintenance"
_FORGED = "what it is about is made by the TPM alone; a forged one needs tpmProof"
_NOT_COUNTED = "a counter of 32 bits at its end"

_NO_SUCH_KEY = "no TPM makes or loads such a key"
_NO_EK = "there is no owner without an EK: TPM_RevokeTrust takes the owner away too"
_ENDED_BEFORE = "what brings it about ends the delegate's sessions; the check stands behind that"

ONLY_OURS: dict[tuple[str, str], str] = {
    ("CMK_CreateBlob", "BAD_KEY_PROPERTY"): _FORGED,
    ("CMK_CreateBlob", "INAPPROPRIATE_ENC"): _FORGED,
    ("DAA_Join", "DAA_ISSUER_SETTINGS"): _FORGED,
    ("DSAP", "BAD_DELEGATE"): _FORGED,
    ("Unseal", "INAPPROPRIATE_ENC"): _FORGED,
    ("Quote", "INVALID_KEYUSAGE"): _NO_SUCH_KEY,
    ("Quote2", "INVALID_KEYUSAGE"): _NO_SUCH_KEY,
    ("DAA_Join", "NO_ENDORSEMENT"): _NO_EK,
    ("OwnerReadInternalPub", "NO_ENDORSEMENT"): _NO_EK,
    ("OwnerReadPubek", "NO_ENDORSEMENT"): _NO_EK,
    ("Delegate_CreateOwnerDelegation", "DISABLED_CMD"): _ENDED_BEFORE,
    ("Delegate_UpdateVerification", "DISABLED_CMD"): _ENDED_BEFORE,
    ("OwnerReadPubek", "BADINDEX"): _ENDED_BEFORE,
    ("Delegate_CreateOwnerDelegation", "FAMILYCOUNT"): _NOT_COUNTED,
    ("Extend", "AUDITFAIL_SUCCESSFUL"): _NOT_COUNTED,
    ("SaveContext", "TOOMANYCONTEXTS"): _NOT_COUNTED,
    ("SaveContext", "CONTEXT_GAP"): "the profile that libtpms compares with has no such limit",
    ("KeyControlOwner", "NOSPACE"): "how many keys the owner may keep is each maker's own",
    ("TakeOwnership", "BAD_MODE"): "libtpms opens no OSAP session without an owner",
}  # fmt: skip
WHOLE_COMMANDS = dict.fromkeys(
    (
        "CreateMaintenanceArchive",
        "LoadMaintenanceArchive",
        "KillMaintenanceFeature",
        "LoadManuMaintPub",
        "ReadManuMaintPub",
    ),
    NO_MAINTENANCE,
)
"""Commands of which no code can be compared."""


@dataclass
class Coverage:
    """The codes of one command, as far as the engine's tests reach them.

    Attributes:
        agreed: Both gave them to the same request.
        deviating: Ours, where a named deviation showed.
        only_ours: Why swtpm cannot be asked.
        missing: None of these.
    """

    agreed: set[str] = field(default_factory=set)
    deviating: set[str] = field(default_factory=set)
    only_ours: dict[str, str] = field(default_factory=dict)
    missing: set[str] = field(default_factory=set)


def shown():
    """What the comparisons showed: {command: agreed codes}, {command: our codes that deviate}."""
    agreed: dict[str, set[str]] = {}
    deviating: dict[str, set[str]] = {}
    for kept in recorded().values():
        for ordinal, codes in kept["agreed"].items():
            agreed.setdefault(NAMES.get(int(ordinal, 16)), set()).update(codes)
        for line in [line for lines in kept["deviating"].values() for line in lines]:
            name, (mine, other) = NAMES.get(int(line[:10], 16)), _codes(line)
            # The same code with other bytes behind it is agreed on, as a code.
            (agreed if mine == other else deviating).setdefault(name, set()).add(mine)
    return agreed, deviating


def _codes(line):
    """Our code and libtpms' of a line of `agreed.json`."""
    mine, other = line.rsplit(", libtpms ", 1)
    return mine.rsplit(": ", 1)[1], other


def coverage():
    """Of every command that the engine's tests reach."""
    agreed, deviating = shown()
    found = {}
    for name, codes in reached().items():
        one = found[name] = Coverage()
        for code in codes:
            reason = WHOLE_COMMANDS.get(name) or ONLY_OURS.get((name, code))
            if code in agreed.get(name, ()):
                one.agreed.add(code)
            elif code in deviating.get(name, ()):
                one.deviating.add(code)
            elif reason:
                one.only_ours[code] = reason
            else:
                one.missing.add(code)
    return found
