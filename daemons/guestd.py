"""guestd: one guest, as far as a TPM can tell: it boots measured, then offers tpm0.

What pv-grub did: read what the image boots, extend it into PCR 4 and 5, close the ring. Then what
the kernel's driver does: open the ring again and serve tpm0. No TPM_Startup is sent from here; the
vTPM was started by vtpmd, and a program that sends one gets the TPM's own answer.

Order, so that nothing is half done: image and menu are read before the vTPM is waited for; a guest
that cannot boot leaves no trace in any PCR; tpm0 is there only after the guest has booted.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Final, TypeVar

import trio

from daemons import log_levels, logs, settings
from daemons.domain_options import DomainOptions, parse_domain_options
from daemons.errors import ExitCode, Failure
from daemons.guest import loader
from daemons.guest.boot_image import BootImage
from daemons.guest.measurements import Measurement, forget_measurements, write_measurements
from daemons.guest.tpm0 import CLIENTS_MAX, Tpm0Device
from daemons.guest.tpm0_stream import STALL_S
from daemons.lean_structlog import structlog
from daemons.listeners import Kind, activated_or_listen
from daemons.places import DomainPlaces, Places
from daemons.registry import DomainRecord, Registry
from daemons.ring_client import RingClient
from daemons.sd_notify import Notifier
from daemons.service import run_daemon, serve
from daemons.threads import run_in_thread
from daemons.world import SystemRng
from daemons.xl.domain_config import DomainConfig, read_domain
from protocol.return_codes import TpmError
from tpm12.client import TpmClient
from tpm12.client_core import BadResponseError

PROGRAM: Final = "guestd"
SOCKET_NAME: Final = "tpm0"
"""What the socket is called when systemd passes it."""
VTPM_WAIT_S: Final = 24 * 3600.0
"""How long a guest waits for its vTPM to appear; whoever started it sees what it waits for."""

T = TypeVar("T")


class NotBooted(Failure):
    """The guest did not come to run its kernel."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GuestdSettings:
    """What may be set, in etc/vtpm/guestd.toml."""

    log_level: str = "info"
    clients_max: int = CLIENTS_MAX
    """Programs that have tpm0 open at the same time."""
    stall_s: float = STALL_S
    """How long a program may take within one command, and to read one response, in seconds."""
    reconnect_s: float = 60.0
    """How long a command waits for a vTPM that went away."""


class StatusLine:
    """What `vtpm status` shows of this guest; may be called from any thread."""

    def __init__(self, notifier: Notifier) -> None:
        self._notifier = notifier
        self._running = "starting"
        self._note = ""

    def runs(self, text: str) -> None:
        """Say what the guest does from now on."""
        self._running = text
        self._show()

    def note(self, text: str) -> None:
        """Say something that stays true beside it."""
        self._note = f"; {text}"
        self._show()

    def ring(self, text: str) -> None:
        """Say how the ring is; once it is well again, what the guest does is shown again."""
        structlog.get_logger().info(text)
        if text.startswith("waiting"):
            self._notifier.status(text)
        else:
            self._show()

    def _show(self) -> None:
        self._notifier.status(self._running + self._note)


class Guest:
    """One run of one guest.

    Args:
        places: Of the installation.
        config: The guest's config file.
        record: The guest in the registry.
        status: Where to say how it goes.
        chosen: What was set.
    """

    def __init__(
        self,
        places: Places,
        config: DomainConfig,
        record: DomainRecord,
        status: StatusLine,
        chosen: GuestdSettings,
    ) -> None:
        self._chosen = chosen
        self._places = places
        self._own: DomainPlaces = places.domain(record.name)
        self._config = config
        self._record = record
        self._status = status

    async def run(self) -> None:
        """Boot, then serve tpm0 until SIGTERM.

        Raises:
            Failure: The guest cannot be booted.
        """
        title, measurements = self._read_boot()
        loader.check_vtpm_label(self._options, self._vtpm_label())
        forget_measurements(self._own.directory)
        if not self._record.vtpms:
            self._status.runs(f"running {title}, without a TPM")
            await serve(_nobody, [], is_alive=_have_a_thread)
            return
        await self._load(measurements)
        await self._serve_tpm0(title)

    @property
    def _options(self) -> loader.LoaderOptions:
        arguments = self._config.arguments
        if not isinstance(arguments, loader.LoaderOptions):
            raise Failure(
                f"{self._record.name} is not booted",
                why=f"its config file says that it is a {self._config.role}, not a guest",
                next_step='a guest has kernel="/usr/lib/xen/boot/pv-grub-x86_64.gz"',
                exit_code=ExitCode.CONFIGURATION,
            )
        return arguments

    def _read_boot(self) -> tuple[str, tuple[Measurement, ...]]:
        """Read the image; give the title of what boots and its measurements."""
        disk = next((disk for disk in self._config.disks if disk.target), None)
        if disk is None:
            raise NotBooted(
                f"{self._record.name} is not booted",
                why="it has no disk",
                next_step='add disk=["file:/images/NAME.img,xvda,w"] to its config file',
                exit_code=ExitCode.CONFIGURATION,
            )
        with BootImage(self._places.images(disk.target)) as image:
            menu_path = self._options.menu_path
            return image.entry(menu_path).title, loader.measure(image, menu_path)

    def _vtpm_label(self) -> str | None:
        if not self._record.vtpms:
            return None
        backend = Registry(self._places.registry).get(self._record.vtpms[0].backend)
        return backend.label if backend is not None else None

    def _ring(self) -> RingClient:
        device = self._record.vtpms[0]
        return RingClient(
            self._places.domain(device.backend).ring_socket,
            handle=device.handle,
            reconnect_s=self._chosen.reconnect_s,
            may_forget=False,
            on_status=self._status.ring,
        )

    async def _load(self, measurements: tuple[Measurement, ...]) -> None:
        """Be the loader: measure, record, let go of the ring."""
        with self._ring() as ring:
            await _with_ring(ring, partial(ring.connect, VTPM_WAIT_S))
            self._status.runs("measuring what it boots")
            try:
                await _with_ring(
                    ring,
                    partial(
                        loader.extend_all, measurements, TpmClient(ring.exchange, rng=SystemRng())
                    ),
                )
            except (TpmError, BadResponseError) as error:
                raise NotBooted(
                    f"{self._record.name} is not booted",
                    why=f"its vTPM did not take a measurement: {error}",
                    next_step=f"look at vtpm status and the logs in {self._places.log_dir}",
                ) from error
        write_measurements(self._own.directory, measurements)
        for measurement in measurements:
            structlog.get_logger().info(
                "measured",
                pcr=measurement.pcr,
                what=measurement.what,
                name=measurement.name,
                sha1=measurement.digest,
            )

    async def _serve_tpm0(self, title: str) -> None:
        """Be the kernel's driver: open the ring again and serve tpm0."""
        with self._ring() as ring:
            await _with_ring(ring, partial(ring.connect, VTPM_WAIT_S))
            clients_max = self._chosen.clients_max
            device = Tpm0Device(
                ring.exchange,
                self._status.note,
                ring.close,
                clients_max=clients_max,
                stall_s=self._chosen.stall_s,
            )
            self._status.runs(f"running {title}")
            listener = activated_or_listen(SOCKET_NAME, self._own.tpm0, Kind.STREAM)
            await serve(
                device.handle,
                [listener],
                connections_max=clients_max,
                is_alive=_have_a_thread,
            )


async def _with_ring(ring: RingClient, work: Callable[[], T]) -> T:
    """Run blocking work over a ring in a thread; a cancel closes the ring, which ends the work.

    Raises:
        Failure, TpmError, BadResponseError: What the work raised; not in a group.
    """
    ended: list[Exception] = []
    done = trio.Event()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(_close_when_cancelled, ring, done)
        try:
            result = await run_in_thread(work)
        except (Failure, TpmError, BadResponseError) as error:
            ended.append(error)
        finally:
            done.set()
            nursery.cancel_scope.cancel()
    if ended:
        raise ended[0]
    return result


async def _close_when_cancelled(ring: RingClient, done: trio.Event) -> None:
    try:
        await trio.sleep_forever()
    finally:
        if not done.is_set():
            ring.close()


def _have_a_thread() -> None:
    """Show that this process still gets work done. Its vTPM may be away: that is no fault here."""


async def _nobody(_connection: object) -> None:
    """Serve no connection: there is no listener that could bring one."""


async def run(options: DomainOptions) -> None:
    """Run one guest from its start to its stop."""
    places = Places(options.root)
    chosen = settings.load(places.settings(PROGRAM), GuestdSettings)
    logs.configure(PROGRAM, options.domain, chosen.log_level)
    log_levels.follow(places.log_levels, options.domain, chosen.log_level)
    record = Registry(places.registry).get(options.domain)
    if record is None:
        raise NotBooted(
            f"{options.domain} is not booted",
            why="the registry has no such domain",
            next_step="start it with: vtpm create CFG",
            exit_code=ExitCode.UNAVAILABLE,
        )
    status = StatusLine(Notifier.from_environment(os.environ))
    config = read_domain(options.config)
    await Guest(places, config, record, status, chosen).run()


def main(argv: list[str] | None = None) -> int:
    """Run the daemon and give its exit status."""
    description = "One guest of the vTPM stack."
    options = parse_domain_options(argv, program=PROGRAM, description=description)
    return run_daemon(PROGRAM, partial(run, options))


if __name__ == "__main__":
    raise SystemExit(main())
