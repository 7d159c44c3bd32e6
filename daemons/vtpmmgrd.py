"""vtpmmgrd: the manager. One per machine, between the vTPMs and the hardware TPM.

In this order, so that nothing is half done: configuration, settings and policy are read; the image
is opened and locked; the chip is started, and owned if it has no owner; the vault is opened (or
made, in a blank image); only then is the ring socket there, and READY said. A manager that cannot
open its image serves nobody: a vTPM that is told "unknown" would start fresh.

Requests run in the ring server's worker threads, one at a time.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Sized
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final, TypeVar

import trio

from daemons import log_levels, logs, policy, settings
from daemons.disk import Disk
from daemons.domain_options import DomainOptions, parse_domain_options
from daemons.errors import ExitCode, Failure
from daemons.faults.hooks import Hooks, hooks_of
from daemons.journal import remove_journal
from daemons.lean_structlog import structlog
from daemons.listeners import Kind, activated_or_listen
from daemons.manager import sealing
from daemons.manager.admission import Admission, Client, label_patterns
from daemons.manager.chip import Chip, ChipSecrets, Progress
from daemons.manager.handle_journal import HandleJournal
from daemons.manager.manager_settings import VtpmmgrdSettings
from daemons.manager.opening import NO_ANCHOR, Wishes, open_vault, reopen_vault
from daemons.manager.request_memory import Once, Pending, RequestMemory, in_doubt, settle
from daemons.manager.requests import Requests, response_of_deletion
from daemons.manager.vault import Vault, inspect
from daemons.manager.vault_format import SealedKey
from daemons.manager.vault_keeper import VaultKeeper
from daemons.places import Places
from daemons.registry import Registry, Role
from daemons.ring_server import Refused, RingPeer, serve_rings
from daemons.sd_notify import Notifier
from daemons.service import run_daemon
from daemons.threads import run_in_thread
from daemons.tis_link import ChipFault, TisLink
from daemons.world import SystemRng
from daemons.xl.domain_arguments import ManagerArguments, TpmDriver
from daemons.xl.domain_config import STATE_DISK, DomainConfig, read_domain
from tpm12.ports import Rng

PROGRAM: Final = "vtpmmgrd"
SOCKET_NAME: Final = "ring"
"""What the ring socket is called when systemd passes it."""
CLOSE_CHIP_S: Final = 1.0

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """What configuration and settings say, checked."""

    image: Path
    arguments: ManagerArguments
    wishes: Wishes


class ManagerBackend:
    """The manager behind its rings.

    Args:
        requests: Answers requests.
        admission: Tells who a ring's frontend is.
        memory: What must not be done twice is written down there.
        records: The records whose number people are shown.
        on_count: Called with that number when it has changed.
    """

    def __init__(
        self,
        requests: Requests,
        admission: Admission,
        memory: RequestMemory,
        records: Sized = (),
        on_count: Callable[[int], None] = lambda _: None,
    ) -> None:
        self._records = records
        self._on_count = on_count
        self._count = len(records)
        self._requests = requests
        self._admission = admission
        self._memory = memory
        self._clients: dict[int, Client] = {}

    def attached(self, peer: RingPeer) -> None:
        """Take a vTPM."""
        try:
            client = self._admission.client(peer)
        except Failure as failure:
            raise Refused(str(failure)) from failure
        self._clients[peer.connection_id] = client
        structlog.get_logger().info("vTPM connected", vtpm=client.domain, uuid=str(client.uuid))

    def execute(self, peer: RingPeer, request: bytes, locality: int, sequence: int) -> bytes:
        """Answer one request. Clients have no locality of the chip: the manager uses its own."""
        del locality
        once = Once(self._memory, Pending(peer.ring_id, sequence, request))
        response = self._requests.execute(self._clients[peer.connection_id], request, once)
        once.answer(response)
        if len(self._records) != self._count:
            self._count = len(self._records)
            self._on_count(self._count)
        return response

    def detached(self, peer: RingPeer) -> None:
        """Let go of a vTPM; its UUID is free for the next connection."""
        self._requests.disconnected(self._clients.pop(peer.connection_id))


# -- the process -----------------------------------------------------------------------------------


async def run(options: DomainOptions) -> None:
    """Run the manager from its start to its stop."""
    places = Places(options.root)
    chosen = settings.load(places.settings(PROGRAM), VtpmmgrdSettings)
    logs.configure(PROGRAM, options.domain, chosen.log_level)
    log_levels.follow(places.log_levels, options.domain, chosen.log_level)
    setup = read_setup(read_domain(options.config), places, chosen)
    admission = Admission(
        options.domain,
        Registry(places.registry),
        policy.load(places.policy),
        label_patterns(chosen.administrators),
    )
    notifier = Notifier.from_environment(os.environ)
    own = places.domain(options.domain)
    places.make_private(own.directory)
    hooks = hooks_of(places, options.domain)
    secrets = ChipSecrets(owner_auth=setup.arguments.owner_auth, srk_auth=setup.arguments.srk_auth)
    with (
        contextlib.closing(hooks.open_disk(setup.image)) as disk,
        _link(places, setup.arguments, hooks) as link,
    ):
        rng = SystemRng()
        chip = Chip(link, secrets, HandleJournal(own.journal), notifier.status, rng)
        opening = partial(_open, path=own.requests, progress=notifier.status, rng=rng)
        vault, sealed, memory = await _with_link(link, partial(opening, disk, chip, setup.wishes))
        reopen = partial(reopen_vault, setup.image, open_disk=hooks.open_disk)
        keeper = VaultKeeper(vault, reopen)
        tell_count = partial(_tell_count, notifier, sealed)
        tell_count(len(vault))
        requests = Requests(
            keeper,
            chip,
            partial(_tell, notifier),
            admission.is_attached,
            recovered=lambda: tell_count(len(keeper)),
        )
        backend = ManagerBackend(requests, admission, memory, keeper, tell_count)
        try:
            listener = activated_or_listen(SOCKET_NAME, own.ring_socket, Kind.SEQPACKET)
            await serve_rings(
                listener,
                backend,
                admission.admit,
                responses=memory,
                settings=chosen.rings,
                is_alive=partial(len, keeper),
                wrap_socket=hooks.ring_socket,
            )
        finally:
            keeper.close()
            memory.close()
            # The chip may be gone; then its session is gone too, or the next manager ends it.
            with trio.move_on_after(CLOSE_CHIP_S, shield=True):
                await run_in_thread(chip.close, abandon_on_cancel=True)


def _open(  # noqa: PLR0913 - everything there is at a start
    disk: Disk, chip: Chip, wishes: Wishes, *, path: Path, progress: Progress, rng: Rng
) -> tuple[Vault, SealedKey, RequestMemory]:
    """Open the vault, and find out what became of a request that a killed manager had begun.

    Raises:
        Failure: See `open_vault` and `RequestMemory`.
    """
    header = inspect(disk).header
    memory = None if header is None else RequestMemory(path, header.vault_id)
    if memory is not None:
        _settle_at_chip(memory, chip)
    forget = partial(remove_journal, path)
    vault, sealed = open_vault(disk, chip, wishes, progress, rng, forget=forget)
    if memory is None:
        memory = RequestMemory(path, vault.header.vault_id, is_new=True)
    elif memory.pending is not None:
        settle(memory, partial(response_of_deletion, records=vault))
    return vault, sealed, memory


def _settle_at_chip(memory: RequestMemory, chip: Chip) -> None:
    if memory.pending is None or not memory.pending.is_for_chip:
        return
    try:
        settle(memory, chip.recollect)
    except ChipFault as fault:
        structlog.get_logger().error(
            "a request is in doubt", ring=memory.pending.ring_id, why=str(fault)
        )
        memory.answer(in_doubt())


def read_setup(config: DomainConfig, places: Places, chosen: VtpmmgrdSettings) -> Setup:
    """Check what the configuration file says.

    Raises:
        Failure: It is no manager's, has no disk, or asks for what is not there.
    """
    arguments = config.arguments
    if config.role is not Role.MANAGER or not isinstance(arguments, ManagerArguments):
        raise _misconfigured(
            config, f"its kernel makes it a {config.role.value}", "Use the manager's file."
        )
    disk = config.disk(STATE_DISK)
    if disk is None or not disk.target or not disk.is_writable:
        raise _misconfigured(
            config,
            f"it has no writable disk {STATE_DISK}",
            f'Add disk=["file:/images/vtpmmgr-stubdom.img,{STATE_DISK},w"].',
        )
    if arguments.tpm_driver is not TpmDriver.TPM_TIS:
        raise _misconfigured(
            config,
            f"this manager has no driver {arguments.tpm_driver.value}",
            "Leave out tpmdriver=, or write tpmdriver=tpm_tis.",
        )
    return Setup(
        image=places.images(disk.target),
        arguments=arguments,
        wishes=Wishes(
            locality=arguments.tpm_locality,
            seal_pcrs=sealing.pcr_indices(chosen.seal_pcrs),
            abandoned_anchor=_nv_index(chosen.abandoned_anchor),
            key_generation=chosen.key_generation,
        ),
    )


def _nv_index(text: str) -> int:
    if not text:
        return NO_ANCHOR
    try:
        return int(text, 16)
    except ValueError:
        raise Failure(
            "the manager's setting abandoned_anchor is refused",
            why=f"{text[:20]!a} is no NV index",
            next_step='Write it as the manager did, like "0x00015000".',
            exit_code=ExitCode.CONFIGURATION,
        ) from None


def _link(places: Places, arguments: ManagerArguments, hooks: Hooks) -> TisLink:
    # tpmirq=0, the default, polls as in Xen; with a number or "probe" the chip's interrupts are
    # taken as they come.
    return TisLink(
        places.tis_socket,
        arguments.tpm_locality,
        monotonic_s=hooks.monotonic_s,
        use_interrupts=arguments.tpm_irq != 0,
    )


async def _with_link(link: TisLink, work: Callable[[], T]) -> T:
    """Run blocking work with the chip in a thread; a cancel cuts the link, which ends the work."""
    async with trio.open_nursery() as nursery:
        done = trio.Event()
        nursery.start_soon(_cut_when_cancelled, link, done)
        try:
            return await run_in_thread(work)
        finally:
            done.set()
            nursery.cancel_scope.cancel()
    raise AssertionError("a nursery does not swallow a return")


async def _cut_when_cancelled(link: TisLink, done: trio.Event) -> None:
    try:
        await trio.sleep_forever()
    finally:
        if not done.is_set():
            link.close()


def _tell_count(notifier: Notifier, sealed: SealedKey, count: int) -> None:
    vtpms = "1 vTPM" if count == 1 else f"{count} vTPMs"
    notifier.status(f"{vtpms} known; {sealing.describe(sealed)}")
    structlog.get_logger().info("vault open", vtpms=count, seal=sealing.describe(sealed))


def _tell(notifier: Notifier, failure: Failure) -> None:
    notifier.status(f"{failure.what}: {failure.why}")
    structlog.get_logger().error(failure.what, why=failure.why, next_step=failure.next_step)


def _misconfigured(config: DomainConfig, why: str, next_step: str) -> Failure:
    return Failure(
        f"{config.name} cannot be the manager",
        why=why,
        next_step=next_step,
        exit_code=ExitCode.CONFIGURATION,
    )


def main(argv: list[str] | None = None) -> int:
    """Run the daemon and give its exit status."""
    description = "The manager of the vTPM stack."
    options = parse_domain_options(argv, program=PROGRAM, description=description)
    return run_daemon(PROGRAM, partial(run, options))


if __name__ == "__main__":
    raise SystemExit(main())
