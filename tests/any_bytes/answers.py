"""What must hold of every answer, whatever was asked."""

import struct
from dataclasses import fields

from protocol.return_codes import ReturnCode
from tpm12.state_codec import encode_section

RESPONSE_BYTES_MAX = 4096
_MAY_CHANGE = {
    "permanent": {"saved_state"},
    "stclear": {"failed_tries", "last_failure_us", "disable_reset_lock"},
    "stany": {"sessions", "transport_sessions", "transport_exclusive", "daa_sessions"},
    "volatile": {"sha1_thread", "sha1_thread_transport", "self_test"},
}
"""What a command that fails may leave changed, by section; see Part 3 §9.3 for the last lock."""


def check_response(response):
    """A response is well formed; its return code."""
    assert 10 <= len(response) <= RESPONSE_BYTES_MAX, response[:32].hex()
    tag, size, code = struct.unpack_from(">HII", response)
    assert size == len(response), response[:32].hex()
    assert tag in {0xC4, 0xC5, 0xC6}, response[:32].hex()
    if code:
        assert response == struct.pack(">HII", 0xC4, 10, code), response[:32].hex()
    return ReturnCode(code)


def check_outcome(before, outcome):
    """An outcome is well formed, and if it is a failure, then one that changed nothing.

    A return code that means "this cannot happen" is as bad as an exception.
    """
    code = check_response(outcome.response)
    assert code == outcome.code
    assert code is not ReturnCode.FAIL
    if code:
        check_unchanged(before, outcome.state, may_change=_MAY_CHANGE)
    return code


def check_unchanged(before, after, may_change):
    """Two states are the same but for some fields."""
    if after is before:
        return
    for section, excepted in may_change.items():
        old, new = getattr(before, section), getattr(after, section)
        if old is new:
            continue
        for field in fields(old):
            one, other = getattr(old, field.name), getattr(new, field.name)
            is_kept = one is other or one == other or field.name in excepted
            assert is_kept, f"{section}.{field.name} was changed by a command that failed"


def stored(state):
    """All of a state that can be stored, as bytes."""
    return [encode_section(getattr(state, name)) for name in ("permanent", "stclear", "stany")]
