"""The start of a domain's process, from "what must be there first" to the opened gate.

The order matters: what the domain depends on, what its start means for others, its directory and
its copy of the config, the fork, the registry record with its pid, and only then the gate. So no
backend ever meets a domain that the registry does not know.
"""

from __future__ import annotations

import os
from pathlib import Path

import trio

from daemons.errors import ExitCode, Failure
from daemons.journal import GO_ON
from daemons.launcher.adoption import CONFIG_BYTES_MAX
from daemons.launcher.chip import Chip
from daemons.launcher.consequences import before_new_volatile_state, keeps_journal, must_go_on
from daemons.launcher.domain import Domain
from daemons.launcher.process_start import Start, empty_directory, start_process
from daemons.launcher.process_states import RESTING, State
from daemons.launcher.ready_marks import READY_NAME
from daemons.launcher.small_files import put_whole
from daemons.launcher.stack import Stack
from daemons.launcher.supervisor import Launched
from daemons.places import Places
from daemons.private_files import read_checked
from daemons.registry import Role, VtpmDevice
from daemons.xl.device_specs import Disk
from daemons.xl.domain_config import STATE_DISK

BACKEND_ROLES = {Role.VTPM: Role.MANAGER, Role.GUEST: Role.VTPM}
"""Who serves the TPMs of whom."""


async def launch_domain(stack: Stack, chip: Chip, domain: Domain) -> Launched:
    """Start the process of a domain.

    Raises:
        Failure: It cannot be started, and waiting would not help.
    """
    await _wait_for_its_world(stack, chip, domain)
    goes_on = keeps_journal(domain, chip.power_cycle)
    if domain.role is Role.VTPM and not goes_on:
        await before_new_volatile_state(stack, domain)
    check_disks(stack, domain)
    await chip.measure(domain)
    if domain.has_started:
        domain.domid = stack.new_domid()
        if not goes_on:
            domain.renew_random_uuids()
    domain.has_started = True
    with trio.CancelScope(shield=True):  # bounded by the spawner's own deadline
        launched = await _spawn(stack, chip, domain)
    return launched  # noqa: RET504 - mypy takes a `with` for one that may swallow errors


async def _spawn(stack: Stack, chip: Chip, domain: Domain) -> Launched:
    places = stack.places.domain(domain.name)
    stack.places.make_private(places.directory)
    power_cycle = chip.power_cycle
    journals = {places.journal.name, places.requests.name}
    kept = journals | {READY_NAME} if keeps_journal(domain, power_cycle) else set()
    has_config = _has_config(stack, domain)
    if has_config:
        kept.add(places.config.name)
    try:
        empty_directory(places.directory, kept)
        if not has_config:
            write_config(stack, domain)
    except OSError as error:
        raise Failure(
            f"cannot prepare the directory of {domain.name}, {places.directory}",
            why=error.strerror or str(error),
            next_step="Make room on its file system, and look at its owner and mode",
            exit_code=ExitCode.IO_ERROR,
        ) from error
    argv = ["--root", str(stack.places.root), "--domain", domain.name]
    argv += ["--config", str(places.config)]
    if domain.role is Role.VTPM and must_go_on(domain, power_cycle):
        argv.append(GO_ON)
    if not keeps_journal(domain, power_cycle):
        domain.ready_before = domain.supervisor.times_ready

    def register(pid: int, start_time: int) -> None:
        stack.registry.put(domain.record(pid, start_time))
        domain.last_process = (pid, start_time)
        domain.power_cycle = power_cycle

    return await start_process(
        stack, Start(name=domain.name, role=domain.role, argv=tuple(argv), register=register)
    )


def keep_for_the_next_launcher(stack: Stack, domain: Domain) -> None:
    """Write down what another launcher needs to start a domain that is not at rest.

    Raises:
        Failure: There is no room for it.
    """
    stack.places.make_private(stack.places.domain(domain.name).directory)
    write_config(stack, domain)
    stack.registry.put(domain.record(*(domain.last_process or (None, None))))


def write_config(stack: Stack, domain: Domain) -> None:
    """Write the domain's copy of its config, whole or not at all.

    Raises:
        Failure: There is no room for it.
    """
    path = stack.places.domain(domain.name).config
    try:
        put_whole(path, domain.effective_config_text.encode())
    except OSError as error:
        raise Failure(
            f"cannot keep the config of {domain.name}",
            why=f"{path}: {(error.strerror or str(error)).lower()}",
            next_step="`vtpm doctor` shows how much room there is",
            exit_code=ExitCode.IO_ERROR,
        ) from error


def _has_config(stack: Stack, domain: Domain) -> bool:
    """Whether its copy is there: on a full disk a killed domain needs no room to go on."""
    path = stack.places.domain(domain.name).config
    try:
        return read_checked(path, CONFIG_BYTES_MAX) == domain.effective_config_text.encode()
    except Failure:
        return False


def check_disks(stack: Stack, domain: Domain) -> None:
    """Check that the images of a domain can be used; what is in them, their owner judges.

    Raises:
        Failure: One is missing, empty, not a file, or may not be opened as it should be.
    """
    for disk in domain.disks:
        check_disk(stack.places, domain.name, domain.role, disk)


def check_disk(places: Places, name: str, role: Role, disk: Disk) -> None:
    """Check one disk of a domain; see `check_disks`."""
    if disk.is_cdrom or not disk.target:
        return
    image = places.images(disk.target)
    what = f"cannot use disk {disk.vdev} of {name}, image {image}"
    try:
        status = image.stat()
    except OSError as error:
        raise _bad_image(what, error.strerror or str(error), image, role) from error
    if not image.is_file() and not image.is_block_device():
        raise _bad_image(what, "it is neither a file nor a block device", image, role)
    if image.is_file() and status.st_size == 0:
        raise _bad_image(what, "it has no bytes", image, role)
    wanted = os.R_OK | (os.W_OK if disk.is_writable else 0)
    if not os.access(image, wanted):
        raise Failure(
            what,
            why=f"uid {os.geteuid()} may not {'write' if disk.is_writable else 'read'} it"
            f" (it belongs to uid {status.st_uid}, mode {status.st_mode & 0o7777:04o})",
            next_step=f"Run: chown {os.geteuid()} {image} && chmod 600 {image}",
            exit_code=ExitCode.NO_PERMISSION,
        )


def _bad_image(what: str, why: str, image: Path, role: Role) -> Failure:
    if role is Role.GUEST:
        next_step = f"Make it with: vtpm image make {image} --kernel FILE"
    else:
        next_step = f"Make it with: dd if=/dev/zero of={image} bs=1M count=2"
    return Failure(what, why=why, next_step=next_step, exit_code=ExitCode.NO_INPUT)


async def _wait_for_its_world(stack: Stack, chip: Chip, domain: Domain) -> None:
    """Wait until everything that the domain needs is there; what is missing is shown."""
    while True:
        missing = _what_is_missing(stack, chip, domain)
        if missing is None:
            return
        domain.supervisor.waits_for(missing)
        await stack.changes.next()


def _what_is_missing(stack: Stack, chip: Chip, domain: Domain) -> str | None:
    # Without power nobody starts; before the first power-on only the manager has to be told so.
    if not chip.is_powered and (domain.role is Role.MANAGER or not chip.is_off):
        return f"waits for the hardware TPM, {chip.why_not_powered}"
    if _needs_disk(domain):
        return f"waits for its disk {STATE_DISK}: vtpm block-attach {domain.name} ..."
    if domain.role is Role.VTPM and not domain.devices:
        return f"waits for its manager: vtpm vtpm-attach {domain.name} backend=NAME"
    waits = (_what_backend_lacks(stack, device) for device in domain.devices)
    return next((wait for wait in waits if wait is not None), None)


def _what_backend_lacks(stack: Stack, device: VtpmDevice) -> str | None:
    backend = stack.domains.get(device.backend)
    if backend is None:
        return f"waits for {device.backend}, which does not exist: vtpm create its config file"
    if not backend.is_running:
        return f"waits for {backend.name}, which is {backend.shown_state}"
    return None


def _needs_disk(domain: Domain) -> bool:
    return domain.role in {Role.MANAGER, Role.VTPM} and not any(
        disk.vdev == STATE_DISK for disk in domain.disks
    )


def waits_for_somebody(stack: Stack, domain: Domain) -> bool:
    """Tell whether a domain waits for something that only a person can bring."""
    if domain.supervisor.state is not State.WAITING:
        return False
    if _needs_disk(domain) or (domain.role is Role.VTPM and not domain.devices):
        return True
    backends = [stack.domains.get(device.backend) for device in domain.devices]
    return any(backend is None or _is_stuck(stack, backend) for backend in backends)


def _is_stuck(stack: Stack, backend: Domain) -> bool:
    return backend.external is None and (
        backend.supervisor.state in RESTING | {State.PAUSED} or waits_for_somebody(stack, backend)
    )
