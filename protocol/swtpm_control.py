"""swtpm's control channel: what QEMU, libvirt and swtpm_ioctl say beside a TPM's commands.

A request is the number of a command and its operands, a response a return code of the TPM and
results; all of it is big-endian. A request has no length: it is what one call receives, and may
have bytes behind its operands (a structure of C, with its padding).

Source: swtpm's manual page swtpm_ioctls(3) and its header tpm_ioctl.h; not an interface of the TCG.

Leaves to others: what is done (`daemons/swtpm_control.py`).
"""

from __future__ import annotations

from enum import IntEnum
from typing import Annotated

import construct as cs

from protocol.wire import U8, U32, wire

HASH_BYTES_MAX = 4096
"""Most data of one HASH_DATA."""


class ControlCommand(IntEnum):
    """Numbers of the commands."""

    GET_CAPABILITY = 0x01
    INIT = 0x02
    SHUTDOWN = 0x03
    GET_TPMESTABLISHED = 0x04
    SET_LOCALITY = 0x05
    HASH_START = 0x06
    HASH_DATA = 0x07
    HASH_END = 0x08
    CANCEL_TPM_CMD = 0x09
    STORE_VOLATILE = 0x0A
    RESET_TPMESTABLISHED = 0x0B
    GET_STATEBLOB = 0x0C
    SET_STATEBLOB = 0x0D
    STOP = 0x0E
    GET_CONFIG = 0x0F
    SET_DATAFD = 0x10
    SET_BUFFERSIZE = 0x11
    GET_INFO = 0x12
    LOCK_STORAGE = 0x13


class Capability(IntEnum):
    """What GET_CAPABILITY says of groups of commands."""

    INIT = 1 << 0
    SHUTDOWN = 1 << 1
    GET_TPMESTABLISHED = 1 << 2
    SET_LOCALITY = 1 << 3
    HASHING = 1 << 4
    RESET_TPMESTABLISHED = 1 << 7
    STOP = 1 << 10
    GET_CONFIG = 1 << 11
    SET_DATAFD = 1 << 12
    SET_BUFFERSIZE = 1 << 13


@wire
class NoOperands:
    """A request that is its number."""


@wire
class InitIn:
    """INIT."""

    init_flags: U32


@wire
class LocalityIn:
    """SET_LOCALITY and RESET_TPMESTABLISHED."""

    locality: U8


@wire
class HashDataIn:
    """HASH_DATA, in front of its data."""

    length: U32


@wire
class BufferSizeIn:
    """SET_BUFFERSIZE; 0 asks."""

    buffer_size: U32


@wire
class ResultOut:
    """All responses begin so, and most are no more."""

    tpm_result: U32


@wire
class CapabilitiesOut:
    """GET_CAPABILITY: the sum of some `Capability`."""

    tpm_result: U32
    capabilities: U32


@wire
class EstablishedOut:
    """GET_TPMESTABLISHED."""

    tpm_result: U32
    bit: U8
    pad: Annotated[bytes, cs.Bytes(3)] = bytes(3)


@wire
class ConfigOut:
    """GET_CONFIG: no flag is known here; they tell with which keys a state is encrypted."""

    tpm_result: U32
    flags: U32


@wire
class BufferSizeOut:
    """SET_BUFFERSIZE."""

    tpm_result: U32
    buffer_size: U32
    min_size: U32
    max_size: U32
