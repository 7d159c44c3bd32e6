"""Direct anonymous attestation: a whole join and a whole signature, and stages out of order."""

from functools import cache

from tests.differential.owner_scenarios import owner
from tests.tpm12.daa_issuer import JOIN, SIGN, Issuer, join, sign
from tests.tpm12.witness import number, sized, u8, u32


@cache
def issuer():
    """The same for both sides."""
    return Issuer()


def stages(side):
    """Stages without a session, out of order, and with other operands."""
    for ordinal in (JOIN, SIGN):
        for stage in (0, 1, 2, 24, 25, 255):
            params = u8(stage) + sized(b"") + sized(b"")
            answer = side.tpm.auth(ordinal, params, owner(side.rested()), handles=u32(0))
            side.note(f"{ordinal:x} {stage} of nothing", answer)
    for count in (u32(0), u32(1), b"\1"):
        params = u8(0) + sized(count) + sized(b"")
        answer = side.tpm.auth(JOIN, params, owner(side.rested()), handles=u32(0))
        side.note(f"join {count.hex()}", answer)
        if answer.code:
            continue
        handle = number(answer.body[4:8])
        params = u8(5) + sized(b"") + sized(b"")
        answer = side.tpm.auth(JOIN, params, owner(side.rested()), handles=u32(handle))
        side.note("another stage", answer)
        params = u8(1) + sized(bytes(256)) + sized(b"")
        answer = side.tpm.auth(JOIN, params, owner(side.rested()), handles=u32(handle))
        side.note("after it", answer)


def whole(side):
    """What two hosts would do, which check what they get."""
    credential = side.note("join", join(side.tpm, issuer()))
    side.note("sign", sign(side.tpm, issuer(), credential, b"\1", b"m" * 20))


SCENARIOS = {"DAA stages": ("owned", stages), "DAA": ("owned", whole)}
