"""What firmware, boot loaders and a kernel say to a TPM 1.2, in the order in which they say it.

Written after the public sources of SeaBIOS (`src/tcgbios.c`), Chromium OS verified boot (tpm_lite
and its tests), U-Boot (`lib/tpm-v1.c`) and Linux (`drivers/char/tpm`). None of them has a session
open; what they share is little, and the order of it is what other programs' TPMs are tried on.
"""

from itertools import pairwise

from tests.differential.owner_scenarios import (
    CONTINUE_SELF_TEST,
    EXTEND,
    GET_CAPABILITY,
    GET_TEST_RESULT,
    PCR_READ,
    PHYSICAL_DISABLE,
    PHYSICAL_ENABLE,
    PHYSICAL_SET_DEACTIVATED,
    PRESENCE,
    SAVE_STATE,
    SELF_TEST_FULL,
    SET_OWNER_INSTALL,
    SET_TEMP_DEACTIVATED,
    STARTUP,
)
from tests.tpm12.makers import nv_public
from tests.tpm12.witness import ZERO, selection, sha1, sized, u8, u16, u32

FORCE_CLEAR, READ_PUBEK, GET_RANDOM, FLUSH = 0x5D, 0x7C, 0x46, 0xBA
NV_DEFINE, NV_WRITE, NV_READ, DELEGATE_MANAGE, READ_TABLE = 0xCC, 0xCD, 0xCF, 0xD2, 0xDB
NV_INDEX_LOCK, FIELD_UPGRADE = 0xFFFFFFFF, 0xAA
PRESENT, LOCK, NOT_PRESENT_LOCK, COMMAND_ENABLE, FINALIZE = 0x08, 0x04, 0x14, 0x20, 0x2A0
PPWRITE, GLOBALLOCK, WRITE_STCLEAR, READ_STCLEAR = 0x1, 0x8000, 0x4000, 0x80000000
AREA_0, AREA_1, KERNEL = 0x00000005, 0x00000006, 0x00001008


class Firmware:
    """Says things and gives each a name: the first word and how often it was said."""

    def __init__(self, side):
        self.side = side
        self._said = 0

    def say(self, word, ordinal, body=b"", locality=0):
        self._said += 1
        answer = self.side.tpm.send(ordinal, body, locality=locality)
        return self.side.note(f"{self._said} {word}", answer)

    def power(self):
        self.side.power_on()

    def start(self, startup_type=1):
        return self.say(f"start {startup_type}", STARTUP, u16(startup_type))

    def present(self, how=PRESENT):
        return self.say(f"presence {how:x}", PRESENCE, u16(how))

    def capability(self, area, sub_cap=b""):
        step = f"capability {area:x} {sub_cap.hex()}"
        return self.say(step, GET_CAPABILITY, u32(area) + sized(sub_cap))

    def flags(self):
        self.capability(4, u32(0x108))
        self.capability(4, u32(0x109))

    def define(self, index, attributes, size=4):
        return self.say(f"define {index:x}", NV_DEFINE, nv_public(index, attributes, size) + ZERO)

    def write(self, index, data, offset=0):
        body = u32(index) + u32(offset) + sized(data)
        return self.say(f"write {index:x}", NV_WRITE, body)

    def read(self, index, size=4, offset=0):
        return self.say(f"read {index:x}", NV_READ, u32(index) + u32(offset) + u32(size))

    def extend(self, index):
        return self.say(f"extend {index}", EXTEND, u32(index) + sha1(u8(index)))


def bios(side):
    """A BIOS: starts and tests the TPM, sets it up as its menu says, measures, locks, resumes."""
    firmware = Firmware(side)
    firmware.power()
    firmware.start()
    firmware.say("test", SELF_TEST_FULL)
    for sub_cap in (0x115, 0x120):
        firmware.capability(5, u32(sub_cap))
    if firmware.present().code:
        firmware.flags()
        firmware.present(COMMAND_ENABLE)
        firmware.present()
    firmware.flags()
    firmware.capability(5, u32(0x111))
    for switched in (0, 1):
        firmware.say("enable", PHYSICAL_ENABLE)
        firmware.say("activate", PHYSICAL_SET_DEACTIVATED, u8(0))
        firmware.say("install", SET_OWNER_INSTALL, u8(switched))
        firmware.say("clear", FORCE_CLEAR)
        firmware.say("disable", PHYSICAL_DISABLE)
        firmware.say("install", SET_OWNER_INSTALL, u8(switched))
        firmware.say("deactivate", PHYSICAL_SET_DEACTIVATED, u8(1))
        firmware.flags()
    firmware.say("enable", PHYSICAL_ENABLE)
    firmware.say("activate", PHYSICAL_SET_DEACTIVATED, u8(0))
    firmware.extend(0)
    firmware.power()
    firmware.start()
    firmware.present()
    for index in (*range(8), 23, 24):
        firmware.extend(index)
    firmware.present(NOT_PRESENT_LOCK)
    firmware.present()
    firmware.say("clear", FORCE_CLEAR)
    firmware.flags()
    _sleep(firmware)
    firmware.power()
    firmware.start(2)
    firmware.present()
    firmware.say("deactivate now", SET_TEMP_DEACTIVATED)
    firmware.say("pcr", PCR_READ, u32(0))


def _sleep(firmware):
    firmware.say("save", SAVE_STATE)
    firmware.power()
    firmware.start(2)
    for index in (0, 7, 10, 17, 23):
        firmware.say("pcr", PCR_READ, u32(index))


def verified_boot(side):
    """Verified boot on an unowned TPM: areas of its own, the locks, the limit on writes."""
    firmware = Firmware(side)
    firmware.power()
    firmware.extend(1)
    firmware.start()
    firmware.extend(1)
    firmware.read(AREA_0)
    firmware.say("continue", CONTINUE_SELF_TEST)
    firmware.start()
    firmware.present(COMMAND_ENABLE)
    firmware.present()
    firmware.present(FINALIZE)
    firmware.present(FINALIZE)
    firmware.flags()
    firmware.define(NV_INDEX_LOCK, 0, 0)
    firmware.flags()
    firmware.define(AREA_0, PPWRITE | GLOBALLOCK)
    firmware.define(AREA_1, PPWRITE)
    firmware.define(KERNEL, PPWRITE | WRITE_STCLEAR | READ_STCLEAR, 10)
    for size in (8, 4):
        for index, attributes in ((AREA_0, PPWRITE | GLOBALLOCK), (AREA_1, PPWRITE)):
            firmware.define(index, attributes, size)
            firmware.write(index, b"\x01\x02\x03\x04")
            firmware.read(index)
    for index in (AREA_0, AREA_1, KERNEL, 0x1234):
        firmware.capability(0x11, u32(index))
    firmware.capability(0x0D)
    firmware.write(KERNEL, b"0123456789")
    firmware.write(KERNEL, b"ab", 8)
    firmware.write(KERNEL, b"abc", 8)
    firmware.read(KERNEL, 10)
    firmware.write(KERNEL, b"")
    firmware.write(KERNEL, b"0123456789")
    firmware.read(KERNEL, 0)
    firmware.read(KERNEL, 10)
    firmware.write(0, b"")
    firmware.write(AREA_0, b"\0" * 4)
    firmware.define(AREA_0, PPWRITE | GLOBALLOCK)
    firmware.write(AREA_1, b"\0" * 4)
    firmware.define(AREA_1, PPWRITE, 8)
    firmware.present(LOCK)
    firmware.write(AREA_1, b"\1" * 4)
    firmware.present()
    firmware.say("clear", FORCE_CLEAR)
    firmware.say("family", DELEGATE_MANAGE, u32(0) + u32(1) + sized(b"x"))
    firmware.say("table", READ_TABLE)
    firmware.say("upgrade", FIELD_UPGRADE, u8(0x11) + u16(0))
    _to_the_limit(firmware)


def _to_the_limit(firmware):
    """Write until the TPM will not, clear it, and write again."""
    firmware.power()
    firmware.start()
    firmware.say("test", SELF_TEST_FULL)
    firmware.present()
    for number in range(70):
        if firmware.write(AREA_1, u32(number)).code:
            break
    firmware.write(0, b"")
    firmware.define(AREA_0, PPWRITE | GLOBALLOCK)
    firmware.read(AREA_1)
    firmware.say("clear", FORCE_CLEAR)
    firmware.flags()
    firmware.say("enable", PHYSICAL_ENABLE)
    firmware.say("activate", PHYSICAL_SET_DEACTIVATED, u8(0))
    firmware.write(AREA_1, b"\2" * 4)
    firmware.flags()
    firmware.power()
    firmware.start()
    firmware.write(AREA_1, b"\3" * 4)
    firmware.read(AREA_1)


def boot_loader(side):
    """A boot loader's shell: what its commands send."""
    firmware = Firmware(side)
    firmware.power()
    firmware.capability(5, u32(0x101))
    firmware.start()
    firmware.say("test", SELF_TEST_FULL)
    firmware.say("continue", CONTINUE_SELF_TEST)
    firmware.present(COMMAND_ENABLE)
    firmware.present()
    firmware.define(AREA_0, PPWRITE, 20)
    firmware.write(AREA_0, bytes(range(20)))
    firmware.read(AREA_0, 20)
    firmware.read(AREA_0, 21)
    firmware.read(AREA_0, 20, 1)
    firmware.extend(23)
    firmware.say("reset", 0xC8, selection(23))
    for index in (0, 23, 24):
        firmware.say("pcr", PCR_READ, u32(index))
    firmware.say("pubek", READ_PUBEK, ZERO)
    firmware.say("random", GET_RANDOM, u32(0))
    firmware.say("random", GET_RANDOM, u32(16))
    for kind in range(7):
        firmware.capability(0x14, u32(kind))
        firmware.say(f"flush {kind}", FLUSH, u32(0) + u32(kind))
    firmware.present(FINALIZE)
    firmware.say("disable", PHYSICAL_DISABLE)
    firmware.read(AREA_0, 20)
    firmware.say("enable", PHYSICAL_ENABLE)
    firmware.say("deactivate", PHYSICAL_SET_DEACTIVATED, u8(1))
    firmware.power()
    firmware.start()
    firmware.read(AREA_0, 20)
    firmware.flags()


def kernel(side):
    """A kernel's driver: a TPM 2.0 at first, then what it shows in sysfs; suspend and resume."""
    side.power_on()
    tpm_2 = "8001000000160000017a000000060000010000000001"
    side.note("is it a TPM 2.0?", side.tpm.raw(bytes.fromhex(tpm_2)))
    firmware = Firmware(side)
    firmware.capability(5, u32(0x115))
    firmware.start()
    firmware.capability(5, u32(0x115))
    firmware.capability(5, u32(0x120))
    firmware.say("continue", CONTINUE_SELF_TEST)
    firmware.say("pcr", PCR_READ, u32(0))
    for area, sub_cap in ((4, 0x108), (4, 0x109), (5, 0x111), (5, 0x101), (5, 0x103), (6, 0)):
        firmware.capability(area, u32(sub_cap))
    for area in (6, 0x1A, 0x0D, 7):
        firmware.capability(area)
    for size, after in pairwise((0, 1, 2, 3, 4, 5)):
        firmware.capability(5, bytes(size) + b"\x01" * (after - size))
    firmware.say("pubek", READ_PUBEK, ZERO)
    firmware.say("random", GET_RANDOM, u32(128))
    firmware.extend(10)
    firmware.say("result", GET_TEST_RESULT)
    _sleep(firmware)
    firmware.say("save", SAVE_STATE)
    firmware.extend(10)
    firmware.power()
    firmware.start(2)
    firmware.start(1)


SCENARIOS = {
    "a BIOS": ("with_ek", bios),
    "verified boot": ("factory", verified_boot),
    "a boot loader": ("with_ek", boot_loader),
    "a kernel": ("with_ek", kernel),
}
