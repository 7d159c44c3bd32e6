"""The simulator's control channel, for programs made for swtpm: QEMU, libvirt, swtpm_ioctl.

It moves what has no ordinal: the power, the locality of the commands, the bus cycles of a dynamic
launch, and the connection over which commands come. Who can connect to it owns the TPM, as with
its socket: a locality is what he says.

What swtpm does and this does not, it does not claim in its capabilities and answers BAD_ORDINAL:
state blobs (no running TPM moves to another host), cancelling (no command runs long).

Leaves to others: the bytes (`protocol/swtpm_control.py`), the TPM (`simulator.py`).
"""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final, Protocol

from daemons.listeners import set_receive_timeout, set_send_timeout
from protocol.return_codes import ReturnCode
from protocol.swtpm_control import (
    HASH_BYTES_MAX,
    BufferSizeIn,
    BufferSizeOut,
    CapabilitiesOut,
    Capability,
    ConfigOut,
    ControlCommand,
    EstablishedOut,
    HashDataIn,
    InitIn,
    LocalityIn,
    NoOperands,
    ResultOut,
)
from protocol.wire import DecodeError, decode_from, encode

CLIENTS_MAX: Final = 1
"""Two who switch one TPM on and off would be in each other's way."""
_NUMBER_BYTES: Final = 4
_PADDING_BYTES_MAX: Final = 3
_REQUEST_BYTES_MAX: Final = _NUMBER_BYTES + 4 + HASH_BYTES_MAX
_DESCRIPTORS_MAX: Final = 4
_LOCALITY_MAX: Final = 4
_DONE: Final = ResultOut(tpm_result=0)


class ControlledTpm(Protocol):
    """What is controlled. Each method is a whole, whoever else uses the TPM."""

    locality: int
    """Of the commands that come."""

    @property
    def buffer_bytes(self) -> int:
        """The longest command."""

    @property
    def is_on(self) -> bool:
        """Has it power?"""

    @property
    def established(self) -> bool:
        """TPM_PERMANENT_FLAGS.tpmEstablished."""

    def power_cycle(self) -> None:
        """Power off, where it is on, and on again (TPM_Init)."""

    def switch_off(self) -> None:
        """Power off."""

    def reset_established(self, locality: int) -> int:
        """TSC_ResetEstablishmentBit; its return code."""

    def hash_start(self) -> int:
        """TPM_HASH_START; a return code."""

    def hash_data(self, data: bytes) -> int:
        """TPM_HASH_DATA; a return code."""

    def hash_end(self) -> int:
        """TPM_HASH_END; a return code."""


class ControlChannel:
    """Answers the requests of a client.

    Args:
        tpm: What is controlled.
        take_connection: Given each connection over which TPM commands are to come; False: there
            are too many.
        shut_down: Called when the whole program is to end.
        stall_s: How long a client may stop inside a request, or not read.
    """

    def __init__(
        self,
        tpm: ControlledTpm,
        take_connection: Callable[[socket.socket], bool],
        shut_down: Callable[[], None],
        *,
        stall_s: float,
    ) -> None:
        self._tpm = tpm
        self._take_connection = take_connection
        self._shut_down = shut_down
        self._stall_s = stall_s
        self._commands: socket.socket | None = None

    def serve(self, client: socket.socket, _peer_pid: int) -> None:
        """Answer requests until the client closes; what it gave for commands ends with it.

        Raises:
            DecodeError: A request whose end cannot be found; the client has been told.
            ConnectionError: The client closed inside a request.
            TimeoutError: It stalled there, or did not read.
        """
        set_send_timeout(client, self._stall_s)
        try:
            while self._serve_one(client):
                pass
        except BlockingIOError as error:
            raise TimeoutError("did not read its response") from error
        finally:
            self._end_commands()

    def _serve_one(self, client: socket.socket) -> bool:
        """Answer one request; False: there is none, the client has closed."""
        try:
            with _received(client, self._stall_s) as request:
                if request is None:
                    return False
                response = encode(self._answer(request))
        except DecodeError as error:
            client.sendall(encode(_result(error.code)))
            raise
        client.sendall(response)
        if request.number == ControlCommand.SHUTDOWN:
            self._shut_down()
        return True

    def _answer(self, request: _Request) -> Any:  # noqa: ANN401 - a wire structure
        command = _COMMANDS.get(request.number)
        if command is None or (command.needs_power and not self._tpm.is_on):
            return _result(ReturnCode.BAD_ORDINAL)
        operands: Any
        operands, end = decode_from(command.takes, request.body, 0)
        rest = request.body[end:]
        if len(rest) > _PADDING_BYTES_MAX and not command.has_data:
            return _result(ReturnCode.BAD_PARAMETER)
        if request.number == ControlCommand.SET_DATAFD:
            return self._take(request.descriptors)
        return command.does(self._tpm, operands, rest)

    def _take(self, descriptors: list[int]) -> ResultOut:
        if self._commands is not None and self._commands.fileno() != _CLOSED:
            return _result(ReturnCode.IOERROR)
        if len(descriptors) != 1:
            return _result(ReturnCode.BAD_PARAMETER)
        try:
            connection = socket.socket(fileno=descriptors[0])
        except OSError:
            return _result(ReturnCode.BAD_PARAMETER)
        descriptors.clear()  # it is the socket's now
        if not _is_half_of_a_pair(connection):
            connection.close()
            return _result(ReturnCode.BAD_PARAMETER)
        connection.setblocking(True)
        if not self._take_connection(connection):
            connection.close()
            return _result(ReturnCode.RESOURCES)
        self._commands = connection
        return _DONE

    def _end_commands(self) -> None:
        """End the connection that this client has given; whoever serves it closes it."""
        commands, self._commands = self._commands, None
        if commands is not None:
            with contextlib.suppress(OSError):
                commands.shutdown(socket.SHUT_RDWR)


_CLOSED: Final = -1


def _is_half_of_a_pair(connection: socket.socket) -> bool:
    """Is it what socketpair(2) makes? What has a name may be an end of our own sockets."""
    if (connection.family, connection.type) != (socket.AF_UNIX, socket.SOCK_STREAM):
        return False
    try:
        return not connection.getpeername() and not connection.getsockname()
    except OSError:  # it is not connected
        return False


# -- requests ------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Request:
    """A request; who uses one of its descriptors takes it out of the list."""

    number: int
    body: bytes
    descriptors: list[int]


@contextlib.contextmanager
def _received(client: socket.socket, stall_s: float) -> Iterator[_Request | None]:
    """The next request, None at the end. Descriptors of it that nobody took are closed."""
    data, descriptors, _, _ = socket.recv_fds(
        client, _REQUEST_BYTES_MAX, _DESCRIPTORS_MAX, socket.MSG_CMSG_CLOEXEC
    )
    try:
        if not data:
            yield None
            return
        if len(data) < _wanted_bytes(data):
            data = _with_its_rest(client, data, stall_s)
        number = int.from_bytes(data[:_NUMBER_BYTES], "big")
        yield _Request(number, data[_NUMBER_BYTES:], descriptors)
    finally:
        for descriptor in descriptors:
            os.close(descriptor)


def _with_its_rest(client: socket.socket, data: bytes, stall_s: float) -> bytes:
    set_receive_timeout(client, stall_s)
    try:
        while (missing := _wanted_bytes(data) - len(data)) > 0:
            more = client.recv(missing)
            if not more:
                raise ConnectionError("closed inside a request")
            data += more
    except BlockingIOError as error:
        raise TimeoutError("stalled inside a request") from error
    set_receive_timeout(client, 0)
    return data


def _wanted_bytes(data: bytes) -> int:
    """How long a request is at least that begins so, as far as that can be said."""
    if len(data) < _NUMBER_BYTES:
        return _NUMBER_BYTES
    command = _COMMANDS.get(int.from_bytes(data[:_NUMBER_BYTES], "big"))
    if command is None:
        return _NUMBER_BYTES
    begun = _NUMBER_BYTES + command.operand_bytes
    if not command.has_data or len(data) < begun:
        return begun
    length = int.from_bytes(data[_NUMBER_BYTES:begun], "big")
    if length > HASH_BYTES_MAX:
        raise DecodeError(ReturnCode.BAD_PARAMETER, f"{length} bytes in one HASH_DATA")
    return begun + length


# -- commands ------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Command:
    """One command.

    Attributes:
        takes, operand_bytes: Its operands, and how many bytes they have.
        does: Called with the TPM, the operands and what comes behind them.
        needs_power: It is refused while the TPM is off.
        has_data: What comes behind the operands is more than padding.
    """

    takes: type
    operand_bytes: int
    does: Callable[[ControlledTpm, Any, bytes], Any]
    needs_power: bool = False
    has_data: bool = False


def _result(code: int) -> ResultOut:
    return ResultOut(tpm_result=int(code))


def _get_capability(_tpm: ControlledTpm, _in: NoOperands, _rest: bytes) -> CapabilitiesOut:
    return CapabilitiesOut(tpm_result=0, capabilities=sum(Capability))


def _init(tpm: ControlledTpm, _in: InitIn, _rest: bytes) -> ResultOut:
    # Its one flag deletes a volatile state that was stored; here none ever is.
    tpm.power_cycle()
    return _DONE


def _stop(tpm: ControlledTpm, _in: NoOperands, _rest: bytes) -> ResultOut:
    tpm.switch_off()
    return _DONE


def _nothing_more(_tpm: ControlledTpm, _in: NoOperands, _rest: bytes) -> ResultOut:
    """What is left to do, the channel does."""
    return _DONE


def _get_established(tpm: ControlledTpm, _in: NoOperands, _rest: bytes) -> EstablishedOut:
    return EstablishedOut(tpm_result=0, bit=int(tpm.established))


def _reset_established(tpm: ControlledTpm, operands: LocalityIn, _rest: bytes) -> ResultOut:
    if operands.locality > _LOCALITY_MAX:
        return _result(ReturnCode.BAD_LOCALITY)
    return _result(tpm.reset_established(operands.locality))


def _set_locality(tpm: ControlledTpm, operands: LocalityIn, _rest: bytes) -> ResultOut:
    if operands.locality > _LOCALITY_MAX:
        return _result(ReturnCode.BAD_LOCALITY)
    tpm.locality = operands.locality
    return _DONE


def _hash_start(tpm: ControlledTpm, _in: NoOperands, _rest: bytes) -> ResultOut:
    return _result(tpm.hash_start())


def _hash_data(tpm: ControlledTpm, operands: HashDataIn, rest: bytes) -> ResultOut:
    if len(rest) != operands.length:
        return _result(ReturnCode.BAD_PARAMETER)
    return _result(tpm.hash_data(rest))


def _hash_end(tpm: ControlledTpm, _in: NoOperands, _rest: bytes) -> ResultOut:
    return _result(tpm.hash_end())


def _get_config(_tpm: ControlledTpm, _in: NoOperands, _rest: bytes) -> ConfigOut:
    return ConfigOut(tpm_result=0, flags=0)


def _set_buffer_size(tpm: ControlledTpm, _in: BufferSizeIn, _rest: bytes) -> BufferSizeOut:
    size = tpm.buffer_bytes
    return BufferSizeOut(tpm_result=0, buffer_size=size, min_size=size, max_size=size)


_COMMANDS: Final[Mapping[int, _Command]] = {
    ControlCommand.GET_CAPABILITY: _Command(NoOperands, 0, _get_capability),
    ControlCommand.INIT: _Command(InitIn, 4, _init),
    ControlCommand.SHUTDOWN: _Command(NoOperands, 0, _nothing_more),
    ControlCommand.GET_TPMESTABLISHED: _Command(NoOperands, 0, _get_established, needs_power=True),
    ControlCommand.SET_LOCALITY: _Command(LocalityIn, 1, _set_locality),
    ControlCommand.HASH_START: _Command(NoOperands, 0, _hash_start, needs_power=True),
    ControlCommand.HASH_DATA: _Command(HashDataIn, 4, _hash_data, needs_power=True, has_data=True),
    ControlCommand.HASH_END: _Command(NoOperands, 0, _hash_end, needs_power=True),
    ControlCommand.RESET_TPMESTABLISHED: _Command(
        LocalityIn, 1, _reset_established, needs_power=True
    ),
    ControlCommand.STOP: _Command(NoOperands, 0, _stop),
    ControlCommand.GET_CONFIG: _Command(NoOperands, 0, _get_config),
    ControlCommand.SET_DATAFD: _Command(NoOperands, 0, _nothing_more),
    ControlCommand.SET_BUFFERSIZE: _Command(BufferSizeIn, 4, _set_buffer_size),
}
