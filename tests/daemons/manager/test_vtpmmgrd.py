"""The manager as a process, on a real chip process: fresh, killed, restarted, and refused."""

from __future__ import annotations

import contextlib
import os
import select
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from uuid import UUID

import pytest

from daemons.errors import ExitCode
from daemons.listeners import start_time_of
from daemons.places import Places
from daemons.registry import DomainRecord, RegistryWriter, Role, VtpmDevice
from daemons.ring_client import RingClient, RingRefused
from daemons.sd_notify import listen_for_notifications, receive_notification
from daemons.tis_link import TisLink
from daemons.world import SystemRng
from protocol import manager_messages as messages
from protocol.manager_messages import ManagerOrdinal
from protocol.return_codes import ReturnCode, TpmError
from tpm12.client import TpmClient

CONFIG = """name="vtpmmgr"
kernel="/usr/lib/xen/boot/vtpmmgr-stubdom.gz"
extra="tpmlocality=2"
memory=8
disk=["file:/images/vtpmmgr-stubdom.img,hda,w"]
iomem=["fed42,1"]
"""
UUID_1 = UUID("ac0a5b9e-cbe2-4c07-b43b-1d69e46fb839")
DEVICE = VtpmDevice(devid=0, backend="vtpmmgr", uuid=UUID_1, handle=0)
BLOB = bytes(range(64))
DEADLINE_S = 30.0
GATE = ["/bin/sh", "-c", 'read -r go && exec "$0" "$@"']
"""Runs a program once its domain stands in the registry; pid and start time stay."""

RUN = "raise SystemExit(d.main())"


class Platform:
    """A machine: a chip process, a registry, and this test as its launcher and its vTPM."""

    def __init__(self, root: Path) -> None:
        self.places = Places(root)
        self.places.prepare()
        self.places.make_private(self.places.tis_socket.parent)
        self.writer = RegistryWriter(self.places.registry)
        self.image = root / "images" / "vtpmmgr-stubdom.img"
        self.image.parent.mkdir(mode=0o755)
        self.image.write_bytes(bytes(2 << 20))
        self.image.chmod(0o600)
        self.config = root / "vtpmmgr.cfg"
        self.config.write_text(CONFIG)
        self.notifications = listen_for_notifications(self.places.notify_socket)
        self.statuses: list[str] = []
        self.chip = self._start("hwtpmd", "hwtpm", Role.HWTPM)

    def close(self) -> None:
        self.chip.kill()
        self._reap(self.chip)
        self.notifications.close()

    def power_on(self, program: bytes = b"\x18" * 20) -> None:
        """Be domain 0: start the TPM and measure."""
        self.writer.put(self._own("Domain-0", Role.DOMAIN0, "system_u:system_r:dom0_t"))
        with TisLink(self.places.tis_socket, 0) as link:
            link.power_on()
            firmware = TpmClient(link.exchange, rng=SystemRng())
            firmware.startup()
            firmware.extend(0, b"\x01" * 20)
            link.relinquish()
            link.hash_sequence(b"launcher and policy")
        with TisLink(self.places.tis_socket, 2) as link:
            TpmClient(link.exchange, rng=SystemRng()).extend(18, program)
            link.relinquish()
        self.writer.remove("Domain-0")

    def start_manager(self, localities: tuple[int, ...] = (2,)) -> subprocess.Popen[bytes]:
        config = ["--config", str(self.config)]
        return self._start("vtpmmgrd", "vtpmmgr", Role.MANAGER, config, localities)

    @contextlib.contextmanager
    def manager(self) -> Iterator[subprocess.Popen[bytes]]:
        """A manager that is ready; killed at the end."""
        process = self.start_manager()
        try:
            self.wait_for(process)
            yield process
        finally:
            process.kill()
            self._reap(process)

    @contextlib.contextmanager
    def vtpm(
        self,
        label: str = "u:vm_r:vtpm_t",
        name: str = "vtpm-guest1",
        device: VtpmDevice = DEVICE,
    ) -> Iterator[RingClient]:
        """This test as a vTPM, connected."""
        self.writer.put(self._own(name, Role.VTPM, label, (device,)))
        try:
            with RingClient(self.places.domain("vtpmmgr").ring_socket, may_run_twice=True) as ring:
                ring.connect(DEADLINE_S)
                yield ring
        finally:
            self.writer.remove(name)

    def wait_for(self, process: subprocess.Popen[bytes]) -> None:
        """Return when a process has said READY, collecting what it says until then."""
        deadline = time.monotonic() + DEADLINE_S
        while time.monotonic() < deadline:
            readable, _, _ = select.select([self.notifications.socket], [], [], 0.2)
            if process.poll() is not None:
                raise AssertionError(process.communicate()[1].decode())
            if not readable:
                continue
            said = receive_notification(self.notifications.socket)
            if said is None or said.pid != process.pid:
                continue
            self.statuses.append(said.fields.get("STATUS", ""))
            if "READY" in said.fields:
                return
        raise AssertionError(f"not ready: {self.statuses}")

    def refused_start(self, localities: tuple[int, ...] = (2,)) -> tuple[int, str]:
        """Exit status and log of a manager that does not come up."""
        process = self.start_manager(localities)
        try:
            log = process.communicate(timeout=DEADLINE_S)[1].decode()
        finally:
            process.kill()
            self._reap(process)
        return process.returncode, log

    def _start(
        self,
        program: str,
        name: str,
        role: Role,
        more: list[str] | None = None,
        localities: tuple[int, ...] = (),
    ) -> subprocess.Popen[bytes]:
        arguments = ["--root", str(self.places.root), "--domain", name, *(more or [])]
        process = subprocess.Popen(
            [*GATE, sys.executable, "-c", f"import daemons.{program} as d; {RUN}", *arguments],
            stdin=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={**os.environ, "NOTIFY_SOCKET": str(self.places.notify_socket)},
            cwd=Path(__file__).parents[3],
        )
        self.writer.put(
            DomainRecord(
                name=name,
                domid=1,
                role=role,
                label=f"system_u:system_r:{program.removesuffix('d')}_t",
                uid=os.geteuid(),
                pid=process.pid,
                start_time=start_time_of(process.pid),
                localities=localities,
            )
        )
        assert process.stdin is not None
        process.stdin.write(b"go\n")
        process.stdin.flush()
        return process

    @staticmethod
    def _reap(process: subprocess.Popen[bytes]) -> None:
        process.wait()
        for stream in (process.stdin, process.stderr):
            assert stream is not None
            stream.close()

    @staticmethod
    def _own(name: str, role: Role, label: str, vtpms: tuple[VtpmDevice, ...] = ()) -> DomainRecord:
        return DomainRecord(
            name=name,
            domid=0,
            role=role,
            label=label,
            uid=os.geteuid(),
            pid=os.getpid(),
            start_time=start_time_of(os.getpid()),
            vtpms=vtpms,
            localities=(0, 1, 2, 3, 4) if role is Role.DOMAIN0 else (),
            boot_hash="b0" * 20,
        )


@pytest.fixture
def platform(tmp_path: Path) -> Iterator[Platform]:
    platform = Platform(tmp_path / "root")
    try:
        platform.wait_for(platform.chip)
        platform.power_on()
        yield platform
    finally:
        platform.close()


def save(ring: RingClient, blob: bytes = BLOB) -> None:
    request = messages.request(ManagerOrdinal.SAVEHASHKEY, messages.SaveHashKeyIn(hash_key=blob))
    messages.results(messages.Nothing, ring.exchange(request))


def load(ring: RingClient) -> bytes:
    answer = ring.exchange(messages.request(ManagerOrdinal.LOADHASHKEY))
    return messages.results(messages.LoadHashKeyOut, answer).hash_key


def test_fresh_platform_serves_and_survives_kill_and_power_cycle(platform: Platform):
    with platform.manager() as process:
        assert any("endorsement key" in text for text in platform.statuses)
        assert any("no signed configuration" in text for text in platform.statuses)
        with platform.vtpm() as ring:
            with pytest.raises(TpmError) as unknown:
                load(ring)
            assert unknown.value.code == ReturnCode.BAD_PARAMETER
            save(ring)
            assert load(ring) == BLOB
            boot_hash = ring.exchange(messages.request(ManagerOrdinal.GET_BOOT_HASH))
            assert messages.results(messages.GetBootHashOut, boot_hash).kern_hash == b"\xb0" * 20
            drawn = ring.exchange(bytes.fromhex("00c10000000e0000004600000010"))
            assert drawn[:10].hex() == "00c40000001e00000000"
        process.kill()
        process.wait()
    platform.statuses.clear()
    with platform.manager() as process:
        assert not any("making" in text for text in platform.statuses)
        with platform.vtpm() as ring:
            assert load(ring) == BLOB
            save(ring, bytes(52))
        process.terminate()
        assert process.wait(DEADLINE_S) == ExitCode.DONE
    assert not platform.places.domain("vtpmmgr").ring_socket.exists()
    platform.power_on()
    with platform.manager(), platform.vtpm() as ring:
        assert load(ring) == bytes(52)


def test_killed_manager_is_a_pause_for_its_vtpms(platform: Platform):
    first = platform.start_manager()
    platform.wait_for(first)
    with platform.vtpm() as ring:
        save(ring)
        first.kill()
        Platform._reap(first)
        with platform.manager():
            assert load(ring) == BLOB
            save(ring, BLOB[::-1])
            assert load(ring) == BLOB[::-1]


def test_killed_manager_does_not_forget_that_a_vtpm_is_in_use(platform: Platform):
    """An administrator deletes no record that a vTPM, which has said nothing since, still needs."""
    settings = platform.places.settings("vtpmmgrd")
    settings.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
    settings.write_text('administrators = "admin_u:vm_r:vtpm_t"\n')
    with platform.manager(), platform.vtpm() as ring:
        save(ring)
    idle = replace(
        Platform._own("vtpm-guest1", Role.VTPM, "u:vm_r:vtpm_t", (DEVICE,)),
        pid=platform.chip.pid,
        start_time=0,
    )
    platform.writer.put(idle)
    delete = messages.request(ManagerOrdinal.VTPM_DEL, messages.VtpmUuid(uuid=UUID_1.bytes))
    other = replace(DEVICE, uuid=UUID(int=0xD0))
    with platform.manager(), platform.vtpm("admin_u:vm_r:vtpm_t", "vtpm-dom0", other) as ring:
        with pytest.raises(TpmError) as refused:
            messages.results(messages.Nothing, ring.exchange(delete))
        assert refused.value.code == ReturnCode.FAIL
        platform.writer.remove("vtpm-guest1")
        messages.results(messages.Nothing, ring.exchange(delete))


def test_changed_program_does_not_get_the_key_and_the_image_stays(platform: Platform):
    with platform.manager(), platform.vtpm() as ring:
        save(ring)
    before = platform.image.read_bytes()
    platform.power_on(program=b"\x99" * 20)
    status, log = platform.refused_start()
    assert status == ExitCode.DAMAGED
    assert "PCR 18 (the manager's program)" in log
    assert platform.image.read_bytes() == before
    platform.power_on()
    with platform.manager(), platform.vtpm() as ring:
        assert load(ring) == BLOB


def test_images_that_cannot_be_used_are_refused_and_left(platform: Platform):
    platform.image.write_bytes(b"not a vault" * 1000 + bytes(1 << 20))
    before = platform.image.read_bytes()
    status, log = platform.refused_start()
    assert (status, "no intact root" in log) == (ExitCode.DAMAGED, True)
    assert platform.image.read_bytes() == before
    platform.image.chmod(0o666)
    assert platform.refused_start()[0] == ExitCode.NO_PERMISSION
    platform.image.unlink()
    status, log = platform.refused_start()
    assert (status, "dd if=/dev/zero" in log) == (ExitCode.NO_INPUT, True)


def test_page_that_was_not_granted_is_refused(platform: Platform):
    status, log = platform.refused_start(localities=(0, 1))
    assert status == ExitCode.NO_PERMISSION
    assert "iomem" in log


def test_second_manager_is_told_who_holds_the_image(platform: Platform):
    with platform.manager() as process:
        status, log = platform.refused_start()
        assert status == ExitCode.UNAVAILABLE
        assert f"process {process.pid}" in log


def test_configuration_mistakes_stop_the_start(platform: Platform):
    for wrong in (
        CONFIG.replace("tpmlocality=2", "tpmlocality=9"),
        CONFIG.replace("hda,w", "xvda,w"),
        CONFIG.replace("vtpmmgr-stubdom.gz", "pv-grub-x86_64.gz").replace("tpmlocality=2", ""),
        CONFIG.replace("tpmlocality=2", "tpmdriver=tpmfront"),
    ):
        platform.config.write_text(wrong)
        assert platform.refused_start()[0] == ExitCode.CONFIGURATION


def test_stranger_and_wrong_type_are_refused_at_the_ring(platform: Platform):
    with platform.manager():
        with pytest.raises(RingRefused), platform.vtpm(label="u:vm_r:guest_t"):
            pass
        with platform.vtpm() as ring:
            save(ring)


def test_changed_setting_of_pcrs_seals_anew(platform: Platform):
    with platform.manager(), platform.vtpm() as ring:
        save(ring)
    settings = platform.places.settings("vtpmmgrd")
    settings.parent.mkdir(parents=True, mode=0o755)
    settings.write_text('seal_pcrs = "0,17"\n')
    settings.chmod(0o644)
    platform.statuses.clear()
    with platform.manager():
        assert any("PCR 0,17," in text for text in platform.statuses)
    platform.power_on(program=b"\x99" * 20)
    with platform.manager(), platform.vtpm() as ring:
        assert load(ring) == BLOB
