"""The vault key: had on the platform that sealed it, refused with the reason on any other."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import pytest

from daemons.errors import ExitCode, Failure
from daemons.manager import sealing
from daemons.manager.chip import Chip, ChipRefusal, ChipSecrets
from daemons.manager.sealing import MeasurementsChanged, NotOurSeal, pcr_indices
from daemons.manager.vault import Vault
from daemons.manager.vault_format import RootHeader, SealedKey
from protocol.constants import ResourceType
from protocol.return_codes import ReturnCode
from tests.daemons.manager.chip_bench import (
    LOCALITY,
    EngineLink,
    bench_on,
    boot,
    owned_link,
)
from tests.fakes.faulty_disk import FaultyDisk
from tpm12.client import composite_hash

KEY = bytes(range(32))
VAULT_ID = b"\x11" * 16
PCRS = (*range(8), 17, 18, 19)


def header_with(*seals: SealedKey) -> RootHeader:
    return RootHeader(
        sequence=2, vault_id=VAULT_ID, page_count=512, key_check=bytes(16), seals=seals
    )


def seal(chip: Chip, pcrs: tuple[int, ...] = PCRS, locality: int = LOCALITY) -> SealedKey:
    return sealing.seal(chip, vault_id=VAULT_ID, vault_key=KEY, pcrs=pcrs, locality=locality)


@pytest.fixture
def link() -> EngineLink:
    return owned_link()


@pytest.fixture
def chip(link: EngineLink, tmp_path: Path) -> Chip:
    bench = bench_on(link, tmp_path)
    bench.chip.start()
    return bench.chip


def test_sealed_key_comes_back(chip: Chip, link: EngineLink):
    sealed = seal(chip)
    assert sealing.unseal(chip, header_with(sealed)) == (KEY, sealed)
    assert link.sessions() == ()


def test_sealed_key_comes_back_after_a_power_cycle_with_the_same_measurements(
    chip: Chip, link: EngineLink
):
    sealed = seal(chip)
    boot(link)
    assert sealing.unseal(chip, header_with(sealed))[0] == KEY


def test_seal_says_what_it_is_bound_to(chip: Chip, link: EngineLink):
    sealed = seal(chip)
    values = {pcr: link.firmware.pcr_read(pcr) for pcr in PCRS}
    assert sealing.indices_of(sealed) == PCRS
    assert sealed.digest_at_release == composite_hash(values)
    assert sealed.pcr_values == tuple(values.values())
    assert sealed.locality == 1 << LOCALITY
    assert sealing.describe(sealed) == (
        "sealed to the measurements as they were (PCR 0,1,2,3,4,5,6,7,17,18,19, locality 2):"
        " no signed configuration"
    )
    assert KEY not in sealed.stored_data
    assert KEY.hex() not in repr(sealed)


def test_seal_fits_the_header_of_a_vault(chip: Chip):
    sealed = seal(chip, pcrs=tuple(range(24)))
    vault = Vault.create(
        FaultyDisk(bytes(64 * 1024)),
        KEY,
        vault_id=VAULT_ID,
        seals=(sealed,),
        random_bytes=random.Random(1).randbytes,
    )
    assert vault.header.seals == (sealed,)


def test_pcrs_are_read_at_the_moment_of_sealing(chip: Chip, link: EngineLink):
    """Xen's manager cached them at its start, and made seals that nobody could open."""
    link.extend(18, b"\x55" * 20)
    sealed = seal(chip)
    assert sealing.unseal(chip, header_with(sealed))[0] == KEY


def test_pcr_that_moves_while_sealing_fails_the_seal(chip: Chip, link: EngineLink):
    genuine = link.execute

    def execute(request: bytes) -> bytes:
        if request[6:10] == (0x17).to_bytes(4, "big"):
            link.extend(19, bytes(20))
        return genuine(request)

    link.execute = execute
    with pytest.raises(ChipRefusal) as refused:
        seal(chip)
    assert refused.value.code == ReturnCode.WRONGPCRVAL


@pytest.mark.parametrize("pcr", PCRS)
def test_each_changed_pcr_is_named(chip: Chip, link: EngineLink, pcr: int):
    sealed = seal(chip)
    link.extend(pcr, b"\x66" * 20)
    with pytest.raises(MeasurementsChanged) as refused:
        sealing.unseal(chip, header_with(sealed))
    assert refused.value.exit_code == ExitCode.DAMAGED
    assert f"PCR {pcr} (" in refused.value.why
    assert refused.value.why.count(" and is ") == 1
    assert link.sessions() == ()


def test_changed_manager_program_is_told(chip: Chip, link: EngineLink):
    sealed = seal(chip)
    boot(link, program=b"\x99" * 20)
    with pytest.raises(MeasurementsChanged, match="cannot unseal") as refused:
        sealing.unseal(chip, header_with(sealed))
    assert "PCR 18 (the manager's program)" in refused.value.why
    assert "PCR 17" not in refused.value.why


def test_pcr_that_is_not_sealed_to_may_change(chip: Chip, link: EngineLink):
    sealed = seal(chip, pcrs=(17, 18))
    link.extend(19, b"\x66" * 20)
    link.extend(0, b"\x66" * 20)
    assert sealing.unseal(chip, header_with(sealed))[0] == KEY


def test_unknown_values_still_give_the_pcrs_that_count(chip: Chip, link: EngineLink):
    sealed = replace(seal(chip, pcrs=(17, 18)), pcr_values=())
    link.extend(18, b"\x66" * 20)
    with pytest.raises(MeasurementsChanged) as refused:
        sealing.unseal(chip, header_with(sealed))
    assert "17,18" in refused.value.why


def test_header_that_names_pcrs_no_chip_has_is_a_named_refusal(chip: Chip, link: EngineLink):
    """Anybody can write a header whose checksum is right."""
    sealed = seal(chip, pcrs=(17, 18))
    false = replace(
        sealed,
        pcr_selection=sealed.pcr_selection + b"\xff" * 29,
        pcr_values=sealed.pcr_values + (bytes(20),) * 200,
    )
    link.extend(18, b"\x66" * 20)
    with pytest.raises(MeasurementsChanged, match=r"PCR 18 \(the manager's program\) was"):
        sealing.unseal(chip, header_with(false))


def test_other_locality_does_not_get_the_key(chip: Chip, link: EngineLink):
    sealed = seal(chip)
    for locality in (0, 1, 3, 4):
        link.locality = locality
        with pytest.raises(MeasurementsChanged) as refused:
            sealing.unseal(chip, header_with(sealed))
        assert "locality 2" in refused.value.why
        assert "tpmlocality=" in refused.value.next_step


def test_several_seals_stand_side_by_side(chip: Chip, link: EngineLink):
    first = seal(chip)
    boot(link, program=b"\x99" * 20)
    second = replace(seal(chip), name=b"another program")
    header = header_with(first, second)
    assert sealing.unseal(chip, header) == (KEY, second)
    boot(link)
    assert sealing.unseal(chip, header) == (KEY, first)
    assert "another program" in sealing.describe(second)
    boot(link, program=b"\x77" * 20)
    with pytest.raises(MeasurementsChanged):
        sealing.unseal(chip, header)


def test_other_chip_cannot_open_the_seal(chip: Chip, tmp_path: Path):
    sealed = seal(chip)
    other = EngineLink(seed=b"another chip")
    boot(other)
    other_chip = bench_on(other, tmp_path).chip
    other_chip.start()
    with pytest.raises(NotOurSeal) as refused:
        sealing.unseal(other_chip, header_with(sealed))
    assert refused.value.exit_code == ExitCode.DAMAGED


def test_seal_of_another_vault_is_not_taken(chip: Chip):
    sealed = seal(chip)
    with pytest.raises(NotOurSeal):
        sealing.unseal(chip, replace(header_with(sealed), vault_id=b"\x22" * 16))


def test_header_without_seals_is_a_named_refusal(chip: Chip):
    with pytest.raises(NotOurSeal, match="cannot unseal"):
        sealing.unseal(chip, header_with())


@pytest.mark.parametrize("at", [0, 2, 4, 8, 13, 20, 40, 62, 63, 66, 100, 321])
def test_damaged_seal_is_refused(chip: Chip, link: EngineLink, at: int):
    sealed = seal(chip)
    broken = bytearray(sealed.stored_data)
    broken[at] ^= 1
    with pytest.raises((NotOurSeal, MeasurementsChanged)):
        sealing.unseal(chip, header_with(replace(sealed, stored_data=bytes(broken))))
    assert sealing.unseal(chip, header_with(sealed))[0] == KEY
    for kind in (ResourceType.AUTH, ResourceType.KEY):
        assert link.firmware.handles(kind) == ()


@pytest.mark.parametrize("length", [0, 1, 2, 8, 62, 321])
def test_truncated_seal_is_refused(chip: Chip, length: int):
    sealed = seal(chip)
    cut = replace(sealed, stored_data=sealed.stored_data[:length])
    with pytest.raises(NotOurSeal):
        sealing.unseal(chip, header_with(cut))


def test_wrong_srk_secret_is_told_as_such(link: EngineLink, chip: Chip, tmp_path: Path):
    sealed = seal(chip)
    wrong = ChipSecrets(owner_auth=bytes(20), srk_auth=b"\x01" * 20)
    with pytest.raises(ChipRefusal) as refused:
        sealing.unseal(bench_on(link, tmp_path, wrong).chip, header_with(sealed))
    assert refused.value.exit_code == ExitCode.CONFIGURATION


def test_chip_that_gives_back_something_else_is_not_trusted(chip: Chip, monkeypatch):
    monkeypatch.setattr("tpm12.client.TpmClient.unseal", lambda *_args, **_more: b"something else")
    with pytest.raises(Failure, match="cannot seal"):
        seal(chip)


def test_pcrs_are_read_from_the_setting():
    assert pcr_indices("0-7,17-19") == PCRS
    assert pcr_indices("0, 4-5,17") == (0, 4, 5, 17)


@pytest.mark.parametrize("text", ["", "24", "7-3", "1,,2", "-1", "a", "1-2-3", "0x1", "0-24"])
def test_pcrs_that_a_tpm_does_not_have_are_refused(text: str):
    with pytest.raises(Failure) as refused:
        pcr_indices(text)
    assert refused.value.exit_code == ExitCode.CONFIGURATION
