"""From an image and a chip to an open vault: made, anchored, opened, sealed anew, given a new key.

The order, so that a crash at any point leaves something that the next start understands:

- A new vault says in its first root where it will be anchored, unconfirmed. Then the NV area is
  made and written, the counter is made, and a root confirms both. Until then nobody is served, and
  an image whose area is missing is taken; from then on it is refused.
- At each start a root with the counter's next value is stored, and then the counter moves. So the
  image is the counter's value, or one ahead, never behind.
- A blank image is written only when the chip knows both secrets of the configuration: to correct
  one changes the measurements, and an image that was sealed to those before would not open.
- A blank image is a new vault only where the chip has no anchor of an earlier one, or where the
  settings give up that very anchor.

Leaves to others: the bytes (`vault.py`), the chip (`chip.py`, `chip_anchor.py`, `sealing.py`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from daemons.disk import Disk, PosixDisk
from daemons.errors import ExitCode, Failure
from daemons.lean_structlog import structlog
from daemons.manager import sealing
from daemons.manager.chip import Chip, Progress
from daemons.manager.chip_anchor import NV_INDICES, SECRET_BYTES, ChipAnchor
from daemons.manager.vault import Vault, inspect
from daemons.manager.vault_format import (
    KEY_BYTES,
    Anchorage,
    NotAnchored,
    RolledBack,
    RootHeader,
    SealedKey,
)
from tpm12.ports import Rng

VAULT_ID_BYTES: Final = 16
NO_ANCHOR: Final = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Wishes:
    """What configuration and settings say about the vault.

    Attributes:
        locality: The manager's own.
        seal_pcrs: What the vault key is sealed to.
        abandoned_anchor: NV index of an anchor whose vault is given up; `NO_ANCHOR` for none.
        key_generation: A vault with a lower one gets a new key.
    """

    locality: int
    seal_pcrs: tuple[int, ...]
    abandoned_anchor: int = NO_ANCHOR
    key_generation: int = 1


def open_vault(  # noqa: PLR0913 - everything there is at a start
    disk: Disk,
    chip: Chip,
    wishes: Wishes,
    progress: Progress,
    rng: Rng,
    *,
    forget: Callable[[], None] = lambda: None,
) -> tuple[Vault, SealedKey]:
    """Open the vault in an image, or make one in a blank image.

    Args:
        disk: The image.
        chip: Not started yet.
        wishes: What configuration and settings say.
        progress: Told what takes long.
        rng: Gives keys and nonces.
        forget: Called before a new vault is made: what is kept of an earlier one's requests goes.

    Returns:
        The vault, and the seal by which it is opened.

    Raises:
        Failure: The image is damaged or older than the chip says, or the chip does not give the
            key; both stay as they are.
    """
    # Before the chip is touched: an image that is refused must not cost a chip its owner.
    is_blank = inspect(disk).is_blank
    chip.start()
    anchor = ChipAnchor(chip, wishes.locality)
    if is_blank:
        _require_no_anchor(disk, anchor, wishes, progress)
        # A vault is sealed to the configuration that made it. One that was made with a wrong secret
        # could not be finished with the right one.
        chip.prove_owner()
        # Whoever is killed from here on leaves a vault that the next manager takes for one in use.
        forget()
        progress("making a new vault in a blank image")
        vault, sealed = create_vault(disk, chip, anchor, wishes, rng)
    else:
        progress("unsealing the manager's key")
        vault, sealed = _open(disk, chip, anchor, rng)
    _settle_anchor(disk, vault, anchor, wishes, rng)
    _count_start(disk, vault, anchor)
    sealed = _renewed(chip, vault, sealed, wishes, progress=progress, rng=rng)
    # A session is kept from the first save on; a manager that has nothing to save leaves none.
    chip.close()
    return vault, sealed


def create_vault(
    disk: Disk, chip: Chip, anchor: ChipAnchor, wishes: Wishes, rng: Rng
) -> tuple[Vault, SealedKey]:
    """Make a vault whose key is sealed to the platform as it is measured now."""
    vault_id, vault_key = rng.random(VAULT_ID_BYTES), rng.random(KEY_BYTES)
    sealed = _seal(chip, wishes, vault_id, vault_key)
    vault = Vault.create(
        disk,
        vault_key,
        vault_id=vault_id,
        seals=(sealed,),
        random_bytes=rng.random,
        anchor=anchor,
        anchorage=_new_anchorage(anchor, wishes, rng),
    )
    return vault, sealed


def _open(disk: Disk, chip: Chip, anchor: ChipAnchor, rng: Rng) -> tuple[Vault, SealedKey]:
    opened_by: list[SealedKey] = []

    def unseal(header: RootHeader) -> bytes:
        vault_key, sealed = sealing.unseal(chip, header)
        opened_by.append(sealed)
        return vault_key

    vault = Vault.open(disk, unseal, random_bytes=rng.random, anchor=anchor)
    return vault, opened_by[0]


def _seal(chip: Chip, wishes: Wishes, vault_id: bytes, vault_key: bytes) -> SealedKey:
    return sealing.seal(
        chip,
        vault_id=vault_id,
        vault_key=vault_key,
        pcrs=wishes.seal_pcrs,
        locality=wishes.locality,
    )


def reopen_vault(
    image: Path, failed: Vault, *, open_disk: Callable[[Path], Disk] = PosixDisk
) -> Vault:
    """Open the image again after its disk failed."""
    failed.close()
    disk = open_disk(image)
    try:
        vault = failed.reopened(disk)
    except BaseException:
        disk.close()
        raise
    structlog.get_logger().info("opened the image again", sequence=vault.sequence)
    return vault


# -- the anchor ------------------------------------------------------------------------------------


def _require_no_anchor(disk: Disk, anchor: ChipAnchor, wishes: Wishes, progress: Progress) -> None:
    present = anchor.indices()
    if wishes.abandoned_anchor in present:
        progress("giving up the vault that was here before")
        anchor.remove(wishes.abandoned_anchor)
        present = tuple(index for index in present if index != wishes.abandoned_anchor)
    if present:
        raise Failure(
            f"the manager's image {disk.name} is blank, and the hardware TPM remembers another",
            why=f"NV area 0x{present[0]:08x} was made for an image that is not here",
            next_step="Put that image back. To give it up, with the state of all its vTPMs, write"
            f' abandoned_anchor = "0x{present[0]:08x}" into the settings of vtpmmgrd.',
            exit_code=ExitCode.DAMAGED,
        )


def _new_anchorage(anchor: ChipAnchor, wishes: Wishes, rng: Rng) -> Anchorage:
    # Settings are measured, so the one that gives an anchor up stays with the vault that was made
    # under it. It must not come to mean that vault's own.
    taken = {*anchor.indices(), wishes.abandoned_anchor}
    free = next((index for index in NV_INDICES if index not in taken), None)
    if free is None:
        raise Failure(
            "cannot anchor the manager's image in the hardware TPM",
            why=f"all of its NV areas 0x{NV_INDICES[0]:08x} to 0x{NV_INDICES[-1]:08x} are taken",
            next_step="Remove those that nobody needs, as the TPM's owner.",
            exit_code=ExitCode.UNAVAILABLE,
        )
    return Anchorage(nv_index=free, secret=rng.random(SECRET_BYTES), is_confirmed=False)


def _settle_anchor(disk: Disk, vault: Vault, anchor: ChipAnchor, wishes: Wishes, rng: Rng) -> None:
    """Finish the anchoring of a vault that is new, or was written by version 1."""
    anchorage = vault.anchorage
    if anchorage is None:
        if anchor.indices():
            # It was anchored since: this is a copy from before.
            raise RolledBack(disk.name, vault.sequence, vault.sequence + 1)
        anchorage = _new_anchorage(anchor, wishes, rng)
        vault.set_anchorage(anchorage)
    if anchorage.is_confirmed:
        return
    if anchorage.nv_index not in anchor.indices():
        anchor.define(anchorage)
    anchor.write(anchorage, vault.anchored)
    count_id, value = anchor.make_counter(anchorage)
    vault.set_anchorage(
        replace(anchorage, counter_id=count_id, counter_value=value, is_confirmed=True)
    )


def _count_start(disk: Disk, vault: Vault, anchor: ChipAnchor) -> None:
    """Compare the image with the chip's counter, and move both."""
    anchorage = vault.anchorage
    assert anchorage is not None
    value = anchor.count(anchorage)
    if value is None:
        raise NotAnchored(disk.name, f"its counter 0x{anchorage.counter_id:x} is gone")
    if anchorage.counter_value < value:
        raise NotAnchored(
            disk.name,
            f"its counter is at {value} in the chip, and the image was last used at"
            f" {anchorage.counter_value}: it is an older copy",
        )
    if anchorage.counter_value > value + 1:
        raise NotAnchored(
            disk.name,
            f"its counter is at {value} in the chip, and was at {anchorage.counter_value - 1}:"
            " the chip is older",
        )
    if anchorage.counter_value == value:
        anchorage = replace(anchorage, counter_value=value + 1)
        vault.set_anchorage(anchorage)
    if anchor.count_on(anchorage) is None:
        structlog.get_logger().warning(
            "the counter of the manager's image stays: another one of the chip was used since the"
            " platform was powered on",
            counter=anchorage.counter_id,
        )


# -- seals and keys --------------------------------------------------------------------------------


def _renewed(  # noqa: PLR0913 - everything there is at a start
    chip: Chip,
    vault: Vault,
    sealed: SealedKey,
    wishes: Wishes,
    *,
    progress: Progress,
    rng: Rng,
) -> SealedKey:
    """Bring seals and key to what the settings want; the seal that opens the vault then."""
    if vault.key_generation < wishes.key_generation:
        progress("giving the manager's image a new key")
        return give_new_key(chip, vault, wishes, rng)
    vault.finish_rotation()
    is_ours = sealed.name == sealing.AS_MEASURED
    if is_ours and sealing.indices_of(sealed) != wishes.seal_pcrs:
        progress("sealing the manager's key to the PCRs of the settings")
        others = tuple(seal for seal in vault.header.seals if seal != sealed)
        vault_key, _ = sealing.unseal(chip, vault.header)
        sealed = _seal(chip, wishes, vault.header.vault_id, vault_key)
        vault.reseal((*others, sealed))
    return sealed


def give_new_key(chip: Chip, vault: Vault, wishes: Wishes, rng: Rng) -> SealedKey:
    """Give a vault a new key, sealed to the platform as it is measured now; other seals go.

    Raises:
        Failure: The chip or the disk failed; the vault has the old key or the new one.
    """
    vault_key = rng.random(KEY_BYTES)
    sealed = _seal(chip, wishes, vault.header.vault_id, vault_key)
    vault.rotate(vault_key, (sealed,), generation=wishes.key_generation)
    return sealed
