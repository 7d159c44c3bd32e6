"""NV areas: definition, and each kind of area by everyone who might try."""

from tests.tpm12.makers import (
    AREA_AUTH,
    ET_OWNER,
    NV_DEFINE_SPACE,
    WRONG,
    area_info,
    composite,
    lock_nv,
    nv_public,
)
from tests.tpm12.nv_makers import (
    AUTHREAD,
    AUTHWRITE,
    GLOBALLOCK,
    INDEX,
    OWNERREAD,
    OWNERWRITE,
    PPREAD,
    PPWRITE,
    READ_STCLEAR,
    WRITE_STCLEAR,
    WRITEALL,
    WRITEDEFINE,
    read,
    read_as,
    read_with,
    write,
    write_as,
    write_with,
)
from tests.tpm12.witness import (
    OWNER_AUTH,
    ZERO,
    selection,
    u16,
)

RESET_LOCK_VALUE, SIGN, CERTIFY_KEY, CERTIFY_KEY2 = 0x40, 0x3C, 0x32, 0x33

AREAS = {
    "presence": PPWRITE,
    "owner": OWNERWRITE | OWNERREAD,
    "secret": AUTHWRITE | AUTHREAD,
    "whole": PPWRITE | WRITEALL,
    "write once": PPWRITE | WRITEDEFINE,
    "global lock": PPWRITE | GLOBALLOCK,
    "write lock": PPWRITE | WRITE_STCLEAR,
    "read lock": PPWRITE | READ_STCLEAR,
    "read presence": PPWRITE | PPREAD,
    "owner writes": OWNERWRITE,
    "secret writes": AUTHWRITE | WRITEDEFINE | READ_STCLEAR,
    "owner reads": PPWRITE | OWNERREAD,
    "secret locks": AUTHWRITE | AUTHREAD | WRITE_STCLEAR | READ_STCLEAR,
    "bound": PPWRITE,
    "bound elsewhere": AUTHWRITE | AUTHREAD,
}
_BOUND = {
    "bound": area_info(selection(10), release=composite([10])),
    "bound elsewhere": area_info(selection(10), release=WRONG),
}


def nv_area(log, name):
    """One area in three states of the TPM, by everyone who might try."""
    log.tpm.send(0x4000000A, u16(0x20)).ok()
    for state in ("open", "locked", "locked and present"):
        if state == "locked":
            log.note("lock", lock_nv(log.tpm))
        elif state == "locked and present":
            log.note("present", log.tpm.send(0x4000000A, u16(0x08)))
        _deleted(log)
        _defined(log, f"{state}: none", 0)
        _defined(log, f"{state}: owner or secret", OWNERWRITE | AUTHWRITE)
        info = _BOUND.get(name)
        infos = {"read": info, "write": info} if info else {}
        _defined(log, f"{state}: good", AREAS[name], **infos)
        # Until NV memory is locked libtpms does not look at the owner's HMAC for a read.
        readers = [read_as, read_with] if state == "open" else [read_as, read_with, _read_wrong]
        for data in (b"12345678", b"1234", b"", b"x"):
            for number_of_step, step in enumerate(_tries(log, data, readers)):
                log.note(f"{state}: {data!r} {number_of_step}", step())
            _forgiven(log)
        log.note(f"{state}: index 0", write(log.rested(), b"", index=0))
        log.note(f"{state}: after it", write(log.rested(), b"z"))


def _forgiven(log):
    """Before there are so many failures that swtpm waits: how long, goes by its own clock."""
    log.tpm.auth(RESET_LOCK_VALUE, b"", log.rested().oiap(OWNER_AUTH).ending()).ok()


def _read_wrong(tpm, _secret, *more):
    return read_as(tpm, WRONG, *more)


def _tries(log, data, readers):
    yield lambda: write(log.rested(), data)
    yield lambda: write_as(log.rested(), OWNER_AUTH, data)
    yield lambda: write_with(log.rested(), AREA_AUTH, data)
    yield lambda: write_with(log.rested(), WRONG, data)
    yield lambda: write(log.rested(), data, 7)
    for place in ((8, 0), (2, 7), (0, 0), (8, 0)):
        yield lambda place=place: read(log.rested(), *place)
        for reader in readers:
            secret = OWNER_AUTH if reader is read_as else AREA_AUTH
            yield lambda place=place, reader=reader, secret=secret: reader(
                log.rested(), secret, *place
            )


def _defined(log, step, attributes, size=8, **infos):
    session = log.rested().osap(ET_OWNER, 0, OWNER_AUTH)
    public = nv_public(INDEX, attributes, size, **infos)
    answer = log.tpm.auth(NV_DEFINE_SPACE, public + session.masked(AREA_AUTH), session)
    log.note(f"define {step}", answer)


def _deleted(log):
    """Delete the area if it is there: libtpms fails for good when a redefinition is refused."""
    session = log.rested().osap(ET_OWNER, 0, OWNER_AUTH)
    log.tpm.auth(NV_DEFINE_SPACE, nv_public(INDEX, 0, 0) + ZERO, session)


def nv_definitions(log):
    """Indices, attributes, localities and sizes of areas."""
    for index in (0, 1, 0x10000001, 0x1000F000, 0xF004, 0x0100F000, 0x40000001, 0xFFFFFFFF):
        for size in (0, 8):
            if index != 0xFFFFFFFF or size:
                public = nv_public(index, PPWRITE, size)
                answer = log.rested().send(NV_DEFINE_SPACE, public + ZERO)
                log.note(f"define {index:x} {size}", answer)
    limited = area_info(localities=2)
    _defined(log, "limited write", 0, write=limited)
    _deleted(log)
    _defined(log, "limited read", 0, read=limited)
    _deleted(log)
    _defined(log, "much", PPWRITE, 1 << 20)
    _defined(log, "no locality", PPWRITE, write=area_info(localities=0))
    _defined(log, "selection of 4 bytes", PPWRITE, read=area_info(selection(1, size=4)))


SCENARIOS = {
    "nv definitions": ("owned", nv_definitions),
    **{f"nv area {name}": ("owned", nv_area, name) for name in AREAS},
}
