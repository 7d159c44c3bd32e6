"""NV areas for tests: the commands as a witness sends them, and the attributes."""

from tests.tpm12.makers import (
    define,
)
from tests.tpm12.witness import sized, u32

WRITE, WRITE_AUTH, READ, READ_AUTH, DIR_WRITE, DIR_READ = 0xCD, 0xCE, 0xCF, 0xD0, 0x19, 0x1A
EXTEND = 0x14
READ_STCLEAR, AUTHREAD, OWNERREAD, PPREAD = 0x80000000, 0x40000, 0x20000, 0x10000
GLOBALLOCK, WRITE_STCLEAR, WRITEDEFINE, WRITEALL = 0x8000, 0x4000, 0x2000, 0x1000
AUTHWRITE, OWNERWRITE, PPWRITE = 4, 2, 1
INDEX, DIR, TRIAL, D_INDEX = 0x00011101, 0x10000001, 0x0000F004, 0x1000F000
SIZE = 8
UNUSED = b"\xff" * SIZE


def write(tpm, data, offset=0, *, index=INDEX, **more):
    return tpm.send(WRITE, u32(index) + u32(offset) + sized(data), **more)


def write_as(tpm, secret, data, offset=0, *, index=INDEX, ordinal=WRITE, **more):
    body = u32(index) + u32(offset) + sized(data)
    return tpm.auth(ordinal, body, tpm.oiap(secret).ending(), **more)


def write_with(tpm, secret, data, offset=0, **more):
    return write_as(tpm, secret, data, offset, ordinal=WRITE_AUTH, **more)


def read(tpm, size=SIZE, offset=0, *, index=INDEX, **more):
    return tpm.send(READ, u32(index) + u32(offset) + u32(size), **more)


def read_as(tpm, secret, size=SIZE, offset=0, *, index=INDEX, ordinal=READ, **more):
    body = u32(index) + u32(offset) + u32(size)
    return tpm.auth(ordinal, body, tpm.oiap(secret).ending(), **more)


def read_with(tpm, secret, size=SIZE, offset=0, **more):
    return read_as(tpm, secret, size, offset, ordinal=READ_AUTH, **more)


def data_of(bench, index=INDEX):
    return bench.state.permanent.nv[index].data


def owners(bench, attributes, size=SIZE, index=INDEX, **infos):
    """Define an area as the owner."""
    return define(bench.tpm, index, attributes, size, as_owner=True, **infos)
