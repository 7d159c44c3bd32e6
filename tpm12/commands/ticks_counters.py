"""Timing ticks and monotonic counters: TPM Main r116 Part 3, chapters 23 and 25."""

from __future__ import annotations

from typing import Final

from protocol.constants import EntityType, Ordinal
from protocol.return_codes import ReturnCode, TpmError
from protocol.structures import CounterValue, CurrentTicks, SignInfo
from protocol.wire import B4, U32, Digest, EncAuth, Handle, Nonce, Sized, encode, wire
from tpm12.authorization import (
    OIAP,
    WITH_SHARED_SECRET,
    Authorized,
    counter_entity,
    end_bound_sessions,
)
from tpm12.crypto import hmac_key, sha1
from tpm12.dispatch import AuthBy, Gate, Nothing, command
from tpm12.keys import ATTESTING_USAGES, SHA1_SIGNATURES
from tpm12.state import NO_COUNTER, RELEASED_COUNTER, Counter
from tpm12.ticks import current_ticks
from tpm12.tpm import Tpm

_COUNT_MAX: Final = 0xFFFFFFFF
_COUNTER: Final = "counter"
"""The session for a counter's own secret."""


# -- ticks ---------------------------------------------------------------------------------------


@wire
class GetTicksOut:
    """§23.1 outgoing operands."""

    current_time: CurrentTicks


@command(Ordinal.GET_TICKS, name="GetTicks", section="Part 3 §23.1", gives=GetTicksOut)
def get_ticks(tpm: Tpm, _cmd: Nothing, _auth: Authorized) -> GetTicksOut:
    """Give the ticks since TPM_Init."""
    return GetTicksOut(current_time=current_ticks(tpm))


@wire
class TickStampBlobIn:
    """§23.2 incoming operands."""

    key_handle: Handle
    anti_replay: Nonce
    digest_to_stamp: Digest


@wire
class TickStampBlobOut:
    """§23.2 outgoing operands."""

    current_ticks: CurrentTicks
    sig: Sized


@command(
    Ordinal.TICK_STAMP_BLOB,
    name="TickStampBlob",
    section="Part 3 §23.2",
    takes=TickStampBlobIn,
    gives=TickStampBlobOut,
    gates=Gate.USABLE | Gate.OWNED,
    sessions=(AuthBy("key_handle", may_drop=1),),
)
def tick_stamp_blob(tpm: Tpm, cmd: TickStampBlobIn, auth: Authorized) -> TickStampBlobOut:
    """Sign a digest together with the time.

    Raises:
        TpmError: INVALID_KEYUSAGE for the key's usage, INAPPROPRIATE_SIG for its scheme.
    """
    key = auth.key("key_handle")
    if key.usage not in ATTESTING_USAGES:
        raise TpmError(ReturnCode.INVALID_KEYUSAGE)
    if key.sig_scheme not in SHA1_SIGNATURES:
        raise TpmError(ReturnCode.INAPPROPRIATE_SIG)
    ticks = current_ticks(tpm)
    stamped = SignInfo(
        fixed=b"TSTP", replay=cmd.anti_replay, data=cmd.digest_to_stamp + encode(ticks)
    )
    return TickStampBlobOut(current_ticks=ticks, sig=key.rsa.sign_sha1(sha1(encode(stamped))))


# -- counters ------------------------------------------------------------------------------------


@wire
class CreateCounterIn:
    """§25.1 incoming operands."""

    enc_auth: EncAuth
    label: B4


@wire
class CreateCounterOut:
    """§25.1 outgoing operands."""

    count_id: U32
    counter_value: CounterValue


@command(
    Ordinal.CREATE_COUNTER,
    name="CreateCounter",
    section="Part 3 §25.1",
    takes=CreateCounterIn,
    gives=CreateCounterOut,
    gates=Gate.USABLE | Gate.OWNED,
    sessions=(AuthBy("owner", WITH_SHARED_SECRET),),
)
def create_counter(tpm: Tpm, cmd: CreateCounterIn, auth: Authorized) -> CreateCounterOut:
    """Make a counter that starts above every value any counter ever had.

    Raises:
        TpmError: RESOURCES when every counter is taken.
    """
    secret = auth.decrypt_secret("owner", cmd.enc_auth)
    counters, value = tpm.permanent.counters, tpm.permanent.counter_highest + 1
    free = [i for i in range(tpm.world.profile.counters) if i not in counters]
    if not free or value > _COUNT_MAX:
        raise TpmError(ReturnCode.RESOURCES)
    counter = Counter(label=cmd.label, auth_data=secret, value=value)
    _keep(tpm, free[0], counter)
    return CreateCounterOut(count_id=free[0], counter_value=_shown(counter))


def _keep(tpm: Tpm, count_id: int, counter: Counter) -> None:
    permanent = tpm.change_permanent()
    permanent.counters = {**permanent.counters, count_id: counter}
    permanent.counter_highest = max(permanent.counter_highest, counter.value)


def _shown(counter: Counter) -> CounterValue:
    return CounterValue(label=counter.label, counter=counter.value)


@wire
class CountIdIn:
    """Incoming operands of §25.2 to §25.5: the id is hashed, unlike a handle."""

    count_id: U32


@wire
class CountOut:
    """Outgoing operands of §25.2 and §25.3."""

    count: CounterValue


@command(
    Ordinal.INCREMENT_COUNTER,
    name="IncrementCounter",
    section="Part 3 §25.2",
    takes=CountIdIn,
    gives=CountOut,
    gates=Gate.USABLE | Gate.OWNED,
    sessions=(AuthBy(_COUNTER),),
)
def increment_counter(tpm: Tpm, cmd: CountIdIn, auth: Authorized) -> CountOut:
    """Count up by one; the first counter that does is the only one until ST_CLEAR.

    The active counter is looked at before the secret, so that nobody takes its place by failing.

    Raises:
        TpmError: BAD_COUNTER for one that does not exist, is not the active one, or is at its end;
            AUTHFAIL.
    """
    active = tpm.stclear.count_id
    if active not in {NO_COUNTER, cmd.count_id}:
        raise TpmError(ReturnCode.BAD_COUNTER)
    counter = _counter_at(tpm, cmd.count_id)
    _verify_counter(auth, cmd.count_id, counter)
    if counter.value >= _COUNT_MAX:
        # The specification leaves the end open; a counter that starts anew would not be monotonic.
        raise TpmError(ReturnCode.BAD_COUNTER)
    counted = Counter(label=counter.label, auth_data=counter.auth_data, value=counter.value + 1)
    _keep(tpm, cmd.count_id, counted)
    if active == NO_COUNTER:
        tpm.change_stclear().count_id = cmd.count_id
    return CountOut(count=_shown(counted))


def _counter_at(tpm: Tpm, count_id: int) -> Counter:
    counter = tpm.permanent.counters.get(count_id)
    if counter is None:
        raise TpmError(ReturnCode.BAD_COUNTER)
    return counter


def _verify_counter(auth: Authorized, count_id: int, counter: Counter) -> None:
    session, _ = auth.session(_COUNTER)
    entity = None if session.protocol == OIAP else counter_entity(count_id, counter)
    auth.verify(_COUNTER, hmac_key(counter.auth_data), entity)


@command(
    Ordinal.READ_COUNTER,
    name="ReadCounter",
    section="Part 3 §25.3",
    takes=CountIdIn,
    gives=CountOut,
)
def read_counter(tpm: Tpm, cmd: CountIdIn, _auth: Authorized) -> CountOut:
    """Read a counter.

    Raises:
        TpmError: BAD_COUNTER.
    """
    return CountOut(count=_shown(_counter_at(tpm, cmd.count_id)))


@command(
    Ordinal.RELEASE_COUNTER,
    name="ReleaseCounter",
    section="Part 3 §25.4",
    takes=CountIdIn,
    sessions=(AuthBy(_COUNTER),),
)
def release_counter(tpm: Tpm, cmd: CountIdIn, auth: Authorized) -> None:
    """Give a counter up with its own secret.

    Raises:
        TpmError: BAD_COUNTER; AUTHFAIL.
    """
    _verify_counter(auth, cmd.count_id, _counter_at(tpm, cmd.count_id))
    _release(tpm, cmd.count_id)


@command(
    Ordinal.RELEASE_COUNTER_OWNER,
    name="ReleaseCounterOwner",
    section="Part 3 §25.5",
    takes=CountIdIn,
    gates=Gate.USABLE | Gate.OWNED,
    sessions=(AuthBy("owner"),),
)
def release_counter_owner(tpm: Tpm, cmd: CountIdIn, _auth: Authorized) -> None:
    """Give a counter up as the owner.

    Raises:
        TpmError: BAD_COUNTER.
    """
    _counter_at(tpm, cmd.count_id)
    _release(tpm, cmd.count_id)


def _release(tpm: Tpm, count_id: int) -> None:
    """Forget a counter and end its sessions; its value stays below every new counter's."""
    permanent = tpm.change_permanent()
    permanent.counters = {i: c for i, c in permanent.counters.items() if i != count_id}
    end_bound_sessions(tpm, EntityType.COUNTER, count_id)
    if tpm.stclear.count_id == count_id:
        tpm.change_stclear().count_id = RELEASED_COUNTER
