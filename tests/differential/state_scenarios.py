"""Every ordinal in every state of the TPM, and requests of every wrong shape.

The operands decode and name nothing that is there, so the answer is that of the gates and of the
first checks: before start-up, disabled, deactivated, without an owner, with one.
"""

from protocol.constants import Ordinal
from tests.tpm12.makers import WRONG
from tests.tpm12.test_ordinals import TABLE, body_for
from tests.tpm12.witness import COMMAND, OWNER_AUTH, Witness, frame, sized, u8, u16, u32
from tpm12.commands import ALL

PHYSICAL_PRESENCE, OWNER_SET_DISABLE, SET_TEMP_DEACTIVATED = 0x4000000A, 0x6E, 0x73
PHYSICAL_DISABLE, PHYSICAL_ENABLE = 0x70, 0x6F
GET_CAPABILITY_OWNER, DEFEND_LOCK_RUNNING = 0x66, 0x803
CHANGES_THE_STATE = {
    # What succeeds here, or ends the state that is looked at: these come last.
    Ordinal.STARTUP,
    Ordinal.PHYSICAL_ENABLE,
    Ordinal.PHYSICAL_DISABLE,
    Ordinal.FORCE_CLEAR,
    Ordinal.DISABLE_FORCE_CLEAR,
    Ordinal.SET_TEMP_DEACTIVATED,
    Ordinal.PHYSICAL_SET_DEACTIVATED,
    Ordinal.SET_OWNER_INSTALL,
    Ordinal.NV_DEFINE_SPACE,
    Ordinal.CREATE_ENDORSEMENT_KEY_PAIR,
    Ordinal.CREATE_REVOCABLE_EK,
}
COMMANDS = {declared.ordinal: declared for declared in ALL}


def every_ordinal(side, send=None):
    """Each ordinal with each number of sessions, all unknown; those without operands too."""
    send = send or side.tpm.raw
    for ordinal in sorted(TABLE, key=lambda ordinal: (ordinal in CHANGES_THE_STATE, ordinal)):
        row = TABLE[ordinal]
        if row["section"] == "Xen":
            continue
        declared = COMMANDS.get(ordinal)
        body = body_for(declared) if declared else b""
        for count in range(3):
            send(frame(ordinal, body + bytes(45 * count), COMMAND + count))
            side.note(f"{row['name']} {count}")


def before_startup(side):
    side.power_on()
    every_ordinal(side)


def unowned(side):
    every_ordinal(side)


def owned(side):
    every_ordinal(side)


def disabled(side):
    session = side.tpm.oiap(OWNER_AUTH).ending()
    side.note("disable", side.tpm.auth(OWNER_SET_DISABLE, u8(1), session))
    every_ordinal(side)


def deactivated(side):
    side.note("presence", side.tpm.assert_presence())
    side.note("deactivate", side.tpm.send(SET_TEMP_DEACTIVATED))
    every_ordinal(side)


def started_deactivated(side):
    side.power_on()
    side.note("start", side.tpm.send(Ordinal.STARTUP, u16(3)))
    every_ordinal(side)


def failed(side):
    """A resume of what was never saved is failure mode (Part 3 §3.2, action 4)."""
    side.power_on()
    side.note("resume nothing", side.tpm.send(Ordinal.STARTUP, u16(2)))
    params = u32(0x10) + sized(b"")
    side.note("capability of the maker", side.tpm.send(Ordinal.GET_CAPABILITY, params))
    every_ordinal(side)


def locked_out(side):
    """While the defence against guessing is on.

    On swtpm that is a matter of seconds: what was asked when it had just ended is asked again. It
    lasts twice as long each time.
    """
    aside = Witness(side.exchange_unseen)

    def is_locked():
        answer = aside.auth(GET_CAPABILITY_OWNER, b"", aside.oiap(WRONG))
        aside.send(Ordinal.RESET)
        return answer.code == DEFEND_LOCK_RUNNING

    def send(request):
        seen = len(side.seen)
        while True:
            while not is_locked():
                pass
            side.tpm.raw(request)
            if is_locked():
                return
            del side.seen[seen:]

    every_ordinal(side, send)


def shapes(side):
    """Each ordinal cut short, one byte too long, and without its sessions' bytes."""
    for ordinal, row in TABLE.items():
        declared = COMMANDS.get(ordinal)
        if declared is None:
            continue
        body = body_for(declared)
        count = max(declared.sessions_by_count)
        whole = body + bytes(45 * count)
        cuts = {0, 1, 3, 4, len(body) // 2, len(body) - 1, len(body), len(whole) - 1}
        for cut in sorted(cut for cut in cuts if 0 <= cut < len(whole)):
            side.tpm.raw(frame(ordinal, whole[:cut], COMMAND + count))
            side.note(f"{row['name']} cut at {cut}")
        side.tpm.raw(frame(ordinal, whole + b"\0", COMMAND + count))
        side.note(f"{row['name']} and a byte")


def frames(side):
    """What is no frame."""
    for request in (
        b"\0\xc1\0\0\0\x0b\0\0\0\x0a",
        b"\0\xc1\0\0\0\x09\0\0\0\x0a",
        b"\0\xc0\0\0\0\x0a\0\0\0\x0a",
        b"\0\xc4\0\0\0\x0a\0\0\0\x0a",
        b"\0\xc1\xff\xff\xff\xff\0\0\0\x0a",
        b"\0\xc1\0\0\0\x0a\0\0\0\x0b",
        b"\0\xc1\0\0\0\x0a\0\0\x01\x0b",
        b"\0\xc1\0\0\0\x0a\x40\0\0\x0b",
        b"\0\xc1\0\0\0\x0a\xff\xff\xff\xff",
    ):
        side.tpm.raw(request)
        side.note(request.hex())


SCENARIOS = {
    "before start-up": ("owned", before_startup),
    "unowned": ("with_ek", unowned),
    "owned": ("owned", owned),
    "disabled": ("owned", disabled),
    "deactivated": ("owned", deactivated),
    "started deactivated": ("owned", started_deactivated),
    "failed": ("owned", failed),
    "locked out": ("owned", locked_out),
    "shapes": ("owned", shapes),
    "frames": ("owned", frames),
}
