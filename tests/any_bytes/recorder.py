"""A pytest plugin that keeps requests which succeed, as material for altered ones.

    python -m pytest -q -p tests.any_bytes.recorder tests/tpm12/commands

writes `tests/vectors/requests.txt`: for each ordinal, number of sessions and DAA stage the shortest
and the longest request that some test got a success for, its handles exchanged for those of
`furnished.py`. What no test sent this time stays as it was.
"""

from pathlib import Path

from protocol.constants import AUTH_REQUEST_BYTES, HEADER_BYTES, Ordinal
from protocol.return_codes import ReturnCode
from tests.any_bytes.furnished import daa_handle, key_handle, session_handle, transport_handle
from tests.any_bytes.wire_places import places
from tpm12.engine import Engine
from tpm12.state import TransportSession

PATH = Path(__file__).parents[1] / "vectors" / "requests.txt"
_LONGEST = 1600
_MAKERS = {Ordinal.NV_DEFINE_SPACE, Ordinal.CREATE_COUNTER, Ordinal.DELEGATE_CREATE_KEY_DELEGATION}
_OF_ITS_OWN_SECRET = {Ordinal.NV_WRITE_VALUE_AUTH, Ordinal.NV_READ_VALUE_AUTH}


def _area(ordinal, count):
    """The furnished NV area that such a command can use."""
    if ordinal in _OF_ITS_OWN_SECRET:
        return 2
    return 1 if count else 3


_FURNISHED = {
    "count_id": lambda _ordinal, _count: 1,
    "family_id": lambda _ordinal, _count: 1,
    "nv_index": _area,
}
"""What the operands that name things other than by handles are exchanged for."""
_DAA = (Ordinal.DAA_JOIN, Ordinal.DAA_SIGN)


def load():
    """What was recorded: (name, request) in order."""
    lines = [line.split() for line in PATH.read_text().splitlines()]
    return [(name, bytes.fromhex(request)) for name, request in lines]


class Recorder:
    """Sees every command of every engine."""

    def __init__(self):
        self.kept = {}

    def see(self, engine, request, before):
        ordinal = int.from_bytes(request[6:10], "big")
        command = engine._table.get(ordinal)
        if command is None or len(request) > _LONGEST:
            return
        count = request[1] - 0xC1
        stage = request[14] if ordinal in _DAA else 0
        fitted = self._fit(command, before, bytearray(request), count, stage)
        for wanted, better in (("short", int.__lt__), ("long", int.__gt__)):
            name = f"{command.name}.{count}.{stage}.{wanted}"
            kept = self.kept.get(name)
            if kept is None or better(len(fitted), len(kept)):
                self.kept[name] = fitted

    def _fit(self, command, before, request, count, stage):
        """Exchange the handles that mean something only in the state `before`."""
        handles_at = [HEADER_BYTES + 4 * i for i in range(command.handles_in)]
        first = len(request) - AUTH_REQUEST_BYTES * count
        handles_at += [first + AUTH_REQUEST_BYTES * i for i in range(count)]
        taken = set()
        for at in handles_at:
            handle = int.from_bytes(request[at : at + 4], "big")
            fitted = _fitted(before, handle, command.ordinal, stage, taken)
            request[at : at + 4] = fitted.to_bytes(4, "big")
        for place in places(command.takes, bytes(request), HEADER_BYTES)[0]:
            if place.name in _FURNISHED and command.ordinal not in _MAKERS:
                fitted = _FURNISHED[place.name](command.ordinal, count)
                request[place.at : place.at + place.width] = fitted.to_bytes(place.width, "big")
        return bytes(request)

    def write(self):
        lines, seen = [], set()
        earlier = dict(load()) if PATH.exists() else {}
        for name, request in sorted({**earlier, **self.kept}.items()):
            if request not in seen:
                lines.append(f"{name} {request.hex()}\n")
            seen.add(request)
        PATH.write_text("".join(lines))


def _fitted(before, handle, ordinal, stage, taken):
    keys = {**before.permanent.owner_evict_keys, **before.volatile.keys}
    sessions = {**before.stany.transport_sessions, **before.stany.sessions}
    if handle in keys:
        return key_handle(keys[handle].usage)
    if handle in before.stany.daa_sessions:
        return daa_handle(ordinal, stage)
    session = sessions.get(handle)
    if isinstance(session, TransportSession):
        return transport_handle(encrypts=session.attributes & 1)
    if session is not None:
        entity = session.entity_type if session.protocol != 1 else 0
        protocol = 1 if session.protocol == 1 else 2
        fitted = session_handle(protocol, entity, second=(protocol, entity) in taken)
        taken.add((protocol, entity))
        return fitted
    return handle


def pytest_configure(config):
    recorder = Recorder()
    execute = Engine.execute

    def seen(self, request, locality=0):
        before = self.state
        outcome = execute(self, request, locality)
        if outcome.code == ReturnCode.SUCCESS:
            recorder.see(self, request, before)
        return outcome

    Engine.execute = seen
    config.add_cleanup(recorder.write)
