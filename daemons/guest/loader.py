"""The measuring loader: what pv-grub does before the guest's kernel runs.

PCR 4 takes the kernel, PCR 5 the command line and then the initrd, each by a plain TPM_Extend at
locality 0, in this order. The command line is what pv-grub hands to the kernel: the words after
the kernel's path in menu.lst, without that path and without a closing NUL. A missing initrd is
measured as the empty string.

pv-grub reads files through GRUB's transparent gunzip and so measures a gzip'ed initrd unpacked.
Here a file is measured as it is in the archive, so that `sha1sum` gives the same digest.

Invariants:
- What was measured is what is recorded; nothing is recorded when an extend fails.
- Everything is read before the first extend: a damaged image leaves the PCRs as they were.

Leaves to others: the image (`boot_image`), the ring (`guestd` opens and closes it).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Final, Protocol

from daemons.errors import ExitCode, Failure
from daemons.guest.boot_image import MENU_PATH, BootImage
from daemons.guest.measurements import Measurement, sha1
from daemons.labels import matches_pattern

KERNEL_PCR: Final = 4
CONFIGURATION_PCR: Final = 5
_LABEL_OPTION: Final = "--vtpm-label="


class Pcrs(Protocol):
    """The one command that the loader needs from a TPM."""

    def extend(self, pcr_num: int, in_digest: bytes) -> bytes:
        """Send TPM_Extend and give the PCR's new value; raises TpmError."""


class BadLoaderArgument(Failure):
    """A word in the guest's `extra=` that the loader does not take."""

    def __init__(self, word: str, why: str) -> None:
        super().__init__(
            f"the loader does not take {word!r}",
            why=why,
            next_step='extra="[--vtpm-label=LABEL] [(hd0)/PATH/OF/menu.lst]" is what it takes',
            exit_code=ExitCode.CONFIGURATION,
        )


class WrongVtpmLabel(Failure):
    """The vTPM is not the one that `--vtpm-label` asks for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoaderOptions:
    """What `extra=` tells the loader.

    Attributes:
        vtpm_label: Label that the vTPM's domain must have; a leading `*` stands for at least one
            character. None: any vTPM will do, or none.
        menu_path: Path of the menu in the archive, without a leading slash.
    """

    vtpm_label: str | None = None
    menu_path: str = MENU_PATH

    @classmethod
    def parse(cls, extra: str) -> LoaderOptions:
        """Read the words of `extra=`, as pv-grub's main: a label first, then a menu.

        Raises:
            BadLoaderArgument: Anything else.
        """
        words = extra.split()
        label = None
        if words and words[0].startswith(_LABEL_OPTION):
            label = words.pop(0).removeprefix(_LABEL_OPTION)
            if not label:
                raise BadLoaderArgument(_LABEL_OPTION, "the label is missing")
        if not words:
            return cls(vtpm_label=label)
        if words[0].startswith("-"):
            raise BadLoaderArgument(words[0], "the label must come first, and is its only option")
        if len(words) > 1:
            raise BadLoaderArgument(words[1], "one menu can be named")
        return cls(vtpm_label=label, menu_path=_menu_path(words[0]))


def _menu_path(word: str) -> str:
    path = word
    if word.startswith("("):
        device, _, path = word.partition(")")
        if not device.startswith("(hd"):
            raise BadLoaderArgument(word, "the only device here is (hd0)")
    plain = PurePosixPath(path)
    if not plain.is_absolute() or ".." in plain.parts or plain == PurePosixPath("/"):
        raise BadLoaderArgument(word, "a menu is named by an absolute path in the image")
    return str(plain)[1:]


def check_vtpm_label(options: LoaderOptions, backend_label: str | None) -> None:
    """Refuse to go on without the vTPM that the guest's configuration asks for.

    Args:
        options: The loader's options.
        backend_label: Label of the domain that serves the guest's vTPM; None when it has none.

    Raises:
        WrongVtpmLabel: A label is asked for, and there is no vTPM or it has another label.
    """
    if options.vtpm_label is None:
        return
    if backend_label is None or not matches_pattern(backend_label, options.vtpm_label):
        found = "the guest has no vTPM" if backend_label is None else f"it is {backend_label!r}"
        raise WrongVtpmLabel(
            "the guest is not booted",
            why=f"the label of its vTPM must be {options.vtpm_label!r}, and {found}",
            next_step="set seclabel= in the vTPM's config file, or --vtpm-label= in the guest's",
            exit_code=ExitCode.CONFIGURATION,
        )


def measure(image: BootImage, menu_path: str = MENU_PATH) -> tuple[Measurement, ...]:
    """Read and hash what the image boots, in the order in which it is extended.

    Raises:
        ImageDamaged: The menu or one of its files cannot be read.
    """
    entry = image.entry(menu_path)
    command_line = entry.command_line.encode()
    kernel = image.read(entry.kernel)
    initrd = image.read(entry.initrd) if entry.initrd is not None else b""
    return (
        _measurement(KERNEL_PCR, "kernel", f"/{entry.kernel}", kernel),
        _measurement(CONFIGURATION_PCR, "command line", entry.command_line, command_line),
        _measurement(
            CONFIGURATION_PCR, "initrd", f"/{entry.initrd}" if entry.initrd else "none", initrd
        ),
    )


def extend_all(measurements: tuple[Measurement, ...], tpm: Pcrs) -> None:
    """Extend each measurement in order.

    Raises:
        TpmError: The vTPM refused one; the guest must not be booted.
    """
    for measurement in measurements:
        tpm.extend(measurement.pcr, bytes.fromhex(measurement.digest))


def _measurement(pcr: int, what: str, name: str, data: bytes) -> Measurement:
    return Measurement(pcr=pcr, digest=sha1(data).hex(), what=what, name=name, size=len(data))
