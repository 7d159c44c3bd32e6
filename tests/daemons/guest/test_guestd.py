"""guestd as a process: it boots measured over a real ring, then serves tpm0."""

import contextlib
import hashlib
import os
import signal
import struct
import subprocess
import sys
import uuid

import pytest
import trio

from daemons.errors import ExitCode
from daemons.guest.boot_image import BootFiles, write_boot_image
from daemons.guest.measurements import Measurement, read_measurements, write_measurements
from daemons.guest.tpm0_client import Tpm0Client
from daemons.listeners import Kind, listen
from daemons.places import Places
from daemons.registry import DomainRecord, RegistryWriter, Role, VtpmDevice
from daemons.ring_server import RingPeer, serve_rings
from daemons.sd_notify import listen_for_notifications, receive_notification

DEADLINE_S = 30.0
PCR_READ = bytes.fromhex("00c1 0000000e 00000015 00000004")
TPM2_COMMAND = bytes.fromhex("8001 0000000c 00000144 0000")
BADTAG = bytes.fromhex("00c4 0000000a 0000001e")
CONFIG = """
name="guest1"
kernel="/usr/lib/xen/boot/pv-grub-x86_64.gz"
memory=1024
disk=["file:/images/guest1.img,xvda,w"]
vtpm=["backend=vtpm-guest1"]
"""
DEVICE = VtpmDevice(devid=0, backend="vtpm-guest1", uuid=uuid.UUID(int=1), handle=0)


class FakeBackend:
    """A vTPM that answers Extend and PCRRead and remembers who came and what was asked."""

    def __init__(self):
        self.history = []
        self.return_code = 0

    def attached(self, _peer):
        self.history.append("attached")

    def detached(self, _peer):
        self.history.append("detached")

    def execute(self, _peer, request, locality, _sequence):
        self.history.append((locality, request))
        if request[0] == 0x80:
            return BADTAG
        if self.return_code:
            return struct.pack(">HII", 0xC4, 10, self.return_code)
        return struct.pack(">HII20s", 0xC4, 30, 0, hashlib.sha1(request).digest())


class Installation:
    """A scratch root with guest1's image, config and records, and guestd on it."""

    def __init__(self, root):
        self.places = Places(root)
        self.places.prepare()
        for name in ("guest1", "vtpm-guest1"):
            self.places.make_private(self.places.domain(name).directory)
        self.own = self.places.domain("guest1")
        self.image = self.places.images("/images/guest1.img")
        self.image.parent.mkdir()
        self.image.write_bytes(bytes(64 * 1024))
        self.backend = FakeBackend()
        self.texts = []
        self.put_records()
        self.configure(CONFIG)

    def configure(self, text):
        self.own.config.write_text(text)

    def put_records(self, *devices, label="system_u:vm_r:vtpm_t"):
        registry = RegistryWriter(self.places.registry)
        common = {"uid": os.geteuid(), "pid": None, "start_time": None}
        guest = DomainRecord(
            name="guest1",
            domid=3,
            role=Role.GUEST,
            label="system_u:vm_r:guest_t",
            vtpms=devices or (DEVICE,),
            **common,
        )
        registry.put(guest)
        registry.put(
            DomainRecord(name="vtpm-guest1", domid=2, role=Role.VTPM, label=label, **common)
        )
        self.guest = guest

    def make_image(self):
        files = BootFiles(kernel=b"kernel", initrd=b"initrd", command_line="quiet")
        write_boot_image(self.image, files)

    @contextlib.asynccontextmanager
    async def vtpm(self):
        """The vTPM's end of the ring."""
        admit = lambda _peer: RingPeer(domain=self.guest, device=DEVICE)  # noqa: E731
        listener = listen(self.places.domain("vtpm-guest1").ring_socket, Kind.SEQPACKET)
        async with trio.open_nursery() as nursery:
            await nursery.start(serve_rings, listener, self.backend, admit)
            yield
            nursery.cancel_scope.cancel()

    @contextlib.asynccontextmanager
    async def guestd(self):
        """The process; its notifications are kept in `texts`, READY too."""
        with (
            listen_for_notifications(self.places.notify_socket) as notify,
            self.own.log.open("wb") as log,
        ):
            notify.socket.setblocking(False)
            process = subprocess.Popen(  # noqa: ASYNC220 - trio would read its output for us
                [
                    *(sys.executable, "-m", "daemons.guestd", "--root", self.places.root),
                    *("--domain", "guest1", "--config", self.own.config),
                ],
                env={**os.environ, "NOTIFY_SOCKET": str(self.places.notify_socket)},
                stderr=log,
            )
            try:
                self._notify = notify.socket
                yield process
            finally:
                process.kill()
                process.wait()

    async def until_told(self, text):
        """Wait for a notification that holds a text."""
        while not any(text in told for told in self.texts):
            await trio.lowlevel.wait_readable(self._notify)
            fields = receive_notification(self._notify).fields
            self.texts.append("\n".join(f"{name}={value}" for name, value in fields.items()))

    async def ended(self, process):
        """Wait for the process; give its exit status and what it wrote."""
        status = await trio.to_thread.run_sync(process.wait, abandon_on_cancel=True)
        return status, self.own.log.read_text()

    async def exchange(self, *requests):
        def talk():
            with Tpm0Client(self.own.tpm0) as tpm0:
                return [tpm0.exchange(request) for request in requests]

        return await trio.to_thread.run_sync(talk)


@pytest.fixture
def installation(tmp_path):
    return Installation(tmp_path)


def extend(pcr, data):
    return struct.pack(">HIII20s", 0xC1, 34, 0x14, pcr, hashlib.sha1(data).digest())


async def test_guest_boots_measured_then_serves_tpm0(installation):
    installation.make_image()
    with trio.fail_after(DEADLINE_S):
        async with installation.vtpm(), installation.guestd() as process:
            await installation.until_told("READY=1")
            assert installation.backend.history == [
                "attached",
                (0, extend(4, b"kernel")),
                (0, extend(5, b"quiet")),
                (0, extend(5, b"initrd")),
                "detached",
                "attached",
            ]
            assert [m.pcr for m in read_measurements(installation.own.directory)] == [4, 5, 5]
            (response,) = await installation.exchange(PCR_READ)
            assert response[10:] == hashlib.sha1(PCR_READ).digest()
            assert installation.backend.history[-1] == (0, PCR_READ)
            assert any("running guest" in text for text in installation.texts)
            process.send_signal(signal.SIGTERM)
            status, errors = await installation.ended(process)
    assert status == 0, errors
    assert not installation.own.tpm0.exists()
    assert "Traceback" not in errors


async def test_guest_waits_for_its_vtpm_and_says_so(installation):
    installation.make_image()
    with trio.fail_after(DEADLINE_S):
        async with installation.guestd():
            await installation.until_told("waiting for the backend")
            assert not installation.own.tpm0.exists()
            async with installation.vtpm():
                await installation.until_told("READY=1")


async def test_guest_that_waits_stops_at_once(installation):
    installation.make_image()
    with trio.fail_after(DEADLINE_S):
        async with installation.guestd() as process:
            await installation.until_told("waiting for the backend")
            process.send_signal(signal.SIGTERM)
            status, errors = await installation.ended(process)
    assert status == 0, errors


async def test_guest_tells_of_a_tpm2_program(installation):
    installation.make_image()
    with trio.fail_after(DEADLINE_S):
        async with installation.vtpm(), installation.guestd():
            await installation.until_told("READY=1")
            assert await installation.exchange(TPM2_COMMAND, TPM2_COMMAND) == [BADTAG, BADTAG]
            await installation.until_told("sent TPM 2.0 commands, but this is a TPM 1.2")
    assert "running guest; process" in installation.texts[-1]


async def test_guest_whose_vtpm_refuses_a_measurement_is_not_booted(installation):
    installation.make_image()
    installation.backend.return_code = 7
    stale = Measurement(pcr=4, digest="00" * 20, what="kernel", name="/old", size=1)
    write_measurements(installation.own.directory, [stale])
    with trio.fail_after(DEADLINE_S):
        async with installation.vtpm(), installation.guestd() as process:
            status, errors = await installation.ended(process)
    assert status == ExitCode.FAILED
    assert "TPM_DISABLED" in errors
    assert read_measurements(installation.own.directory) == []
    assert installation.backend.history.count("attached") == 1


@pytest.mark.parametrize(
    ("case", "exit_code", "why"),
    [
        ("blank", ExitCode.NO_INPUT, "the image is blank"),
        ("missing", ExitCode.NO_INPUT, "there is no such file"),
        ("damaged", ExitCode.DAMAGED, "no tar header"),
        ("no disk", ExitCode.CONFIGURATION, "it has no disk"),
        ("label", ExitCode.CONFIGURATION, "the label of its vTPM must be"),
        ("unknown", ExitCode.UNAVAILABLE, "the registry has no such domain"),
    ],
)
async def test_guest_that_cannot_boot_says_why_and_extends_nothing(
    installation, case, exit_code, why
):
    if case == "missing":
        installation.image.unlink()
    elif case == "damaged":
        installation.image.write_bytes(b"x" * 2048)
    elif case != "blank":
        installation.make_image()
    if case == "no disk":
        installation.configure(CONFIG.replace("disk", "# disk"))
    elif case == "label":
        installation.configure(CONFIG + 'extra="--vtpm-label=*:other_t"\n')
    elif case == "unknown":
        RegistryWriter(installation.places.registry).remove("guest1")
    with trio.fail_after(DEADLINE_S):
        async with installation.vtpm(), installation.guestd() as process:
            status, errors = await installation.ended(process)
    assert status == exit_code, errors
    assert why in errors
    assert installation.backend.history == []


async def test_guest_with_the_label_that_was_asked_for_boots(installation):
    installation.make_image()
    installation.configure(CONFIG + 'extra="--vtpm-label=*:vm_r:vtpm_t"\n')
    with trio.fail_after(DEADLINE_S):
        async with installation.vtpm(), installation.guestd():
            await installation.until_told("READY=1")
