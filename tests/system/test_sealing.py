"""A secret sealed to what a guest boots: it opens there, and nowhere else."""

import pytest

from protocol.return_codes import ReturnCode, TpmError
from tests.system.belongings import BOOT_PCRS, Belongings
from tests.system.measured_boot import boot_pcrs
from tests.system.scratch_stack import (
    ALL,
    COMMAND_LINE,
    FIRST_CHAIN,
    GUEST1,
    GUEST2,
    IMAGE_OF,
    KERNELS,
)

OTHER_KERNEL = KERNELS[GUEST1] + b"and a back door\n"
FOREIGN = {ReturnCode.NOTSEALED_BLOB, ReturnCode.DECRYPT_ERROR, ReturnCode.BAD_DATASIZE}


def refusal(stack, guest, blob):
    """The return code with which a guest's TPM refuses to unseal a blob."""
    with stack.tpm(guest) as tpm, pytest.raises(TpmError) as refused:
        tpm.unseal(blob)
    return refused.value.code


def pcr(stack, guest, index):
    with stack.tpm(guest) as tpm:
        return tpm.pcr_read(index)


@pytest.mark.slow
def test_secret_opens_for_the_kernel_it_was_sealed_to_and_no_other(stack):
    stack.up(*FIRST_CHAIN)
    things = Belongings()
    things.put_into(stack, GUEST1)

    stack.make_boot(GUEST1, kernel=OTHER_KERNEL, force=True)
    # What runs was measured before; the image counts at the next boot.
    things.check(stack, GUEST1)
    stack.vtpm("reboot", GUEST1)
    assert pcr(stack, GUEST1, 4) == boot_pcrs(GUEST1, OTHER_KERNEL)[4] != boot_pcrs(GUEST1)[4]
    assert pcr(stack, GUEST1, 5) == boot_pcrs(GUEST1)[5]
    assert refusal(stack, GUEST1, things.blob) == ReturnCode.WRONGPCRVAL
    # The same over a restart of everything: it is the kernel that counts.
    stack.down()
    stack.up(*FIRST_CHAIN)
    assert refusal(stack, GUEST1, things.blob) == ReturnCode.WRONGPCRVAL

    stack.make_boot(GUEST1, force=True)
    stack.vtpm("reboot", GUEST1)
    things.check(stack, GUEST1)


def test_other_command_line_does_not_open_it_either(stack):
    stack.up(*FIRST_CHAIN)
    things = Belongings()
    things.put_into(stack, GUEST1)
    boot = stack.root / "boot"
    words = ["image", "make", IMAGE_OF[GUEST1], "--force"]
    words += ["--kernel", str(boot / "guest1-kernel"), "--initrd", str(boot / "guest1-initrd")]
    stack.vtpm(*words, "--cmdline", f"{COMMAND_LINE} init=/bin/sh")
    stack.vtpm("reboot", GUEST1)
    assert pcr(stack, GUEST1, 4) == boot_pcrs(GUEST1)[4]
    assert pcr(stack, GUEST1, 5) != boot_pcrs(GUEST1)[5]
    assert refusal(stack, GUEST1, things.blob) == ReturnCode.WRONGPCRVAL


def test_extend_after_boot_closes_it_until_the_next_boot(stack):
    stack.up(*FIRST_CHAIN)
    things = Belongings()
    things.put_into(stack, GUEST1)
    with stack.tpm(GUEST1) as tpm:
        tpm.extend(5, bytes(20))
    assert refusal(stack, GUEST1, things.blob) == ReturnCode.WRONGPCRVAL
    stack.vtpm("reboot", GUEST1)
    things.check(stack, GUEST1)


def test_other_guest_cannot_open_it_even_with_the_same_boot(stack):
    """guest2 boots the very files of guest1: its PCRs are equal, and its TPM is another."""
    stack.make_boot(GUEST2, kernel=KERNELS[GUEST1], force=True)
    stack.up(*ALL)
    first, second = Belongings(), Belongings()
    first.put_into(stack, GUEST1)
    second.put_into(stack, GUEST2)
    assert [pcr(stack, GUEST1, i) for i in BOOT_PCRS] == [pcr(stack, GUEST2, i) for i in BOOT_PCRS]
    assert refusal(stack, GUEST2, first.blob) in FOREIGN
    assert refusal(stack, GUEST1, second.blob) in FOREIGN
    first.check(stack, GUEST1)
    second.check(stack, GUEST2)


def test_wrong_secret_is_refused_and_counted_but_the_right_one_still_opens(stack):
    stack.up(*FIRST_CHAIN)
    things = Belongings()
    things.put_into(stack, GUEST1)
    with stack.tpm(GUEST1) as tpm:
        for wrong in ({"auth": b"\x01" * 20}, {"parent_auth": b"\x01" * 20}):
            with pytest.raises(TpmError) as refused:
                tpm.unseal(things.blob, **wrong)
            assert refused.value.code in {ReturnCode.AUTHFAIL, ReturnCode.AUTH2FAIL}
    things.check(stack, GUEST1)
