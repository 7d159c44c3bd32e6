"""The stack as systemd runs it, behind the methods of the launcher's control socket.

So the `vtpm` command needs not know who runs the stack: `open_control` finds out. What systemd
knows is asked with `systemctl show`; who is who is in the registry; what a domain is, in its file.

A domain that was created paused has its file and its unit, which is not started; a mark beside the
registry's records says so. A paused one is stopped by a signal, and its process shows it.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Self
from uuid import UUID

from daemons.errors import ExitCode, Failure
from daemons.launcher_client import LauncherClient, StackNotUp
from daemons.places import CHIP_NAME, DOMAIN0_NAME, Places

if TYPE_CHECKING:
    from daemons.launcher.device_rows import End
    from daemons.registry import DomainRecord
    from daemons.systemd.run_state import RunState
    from daemons.xl.domain_config import DomainConfig

TARGET: Final = "vtpm-stack.target"
EVERYBODY: Final = tuple(
    f"{unit}.{suffix}"
    for unit in ("vtpm-guest@*", "vtpm@*", "vtpmmgrd", "hwtpmd")
    for suffix in ("service", "socket")
)
PLATFORM: Final = "vtpm-platform.service"
_SHOWN: Final = (
    "Id,LoadState,ActiveState,SubState,Result,MainPID,NRestarts,StatusText,ExecMainStatus"
)
STOP_S: Final = 5.0
"""How long a process may take to stop where it stands: it may be in a command."""
_LOOK_AGAIN_S: Final = 0.02
_TOLD: Final = frozenset(int(code) for code in ExitCode if code is not ExitCode.DONE)
"""Statuses of daemons that are those of the command, too."""
_SYSTEMD_RUNS: Final = Path("/run/systemd/system")
_STATES: Final[Mapping[str, str]] = {
    "active": "running",
    "reloading": "running",
    "activating": "starting",
    "deactivating": "shutdown",
    "inactive": "shutdown",
    "failed": "failed",
}

Row = dict[str, Any]
Properties = dict[str, str]
Progress = Callable[[str], None]


def open_control(places: Places) -> LauncherClient | SystemdStack:
    """Give the way to whoever runs the stack of an installation: a launcher, or systemd.

    Raises:
        StackNotUp: Nobody does.
        Failure: A launcher does, and this user may not reach it.
    """
    try:
        return LauncherClient(places)
    except StackNotUp:
        if is_run_by_systemd(places):
            return SystemdStack(places)
        raise


def is_run_by_systemd(places: Places) -> bool:
    """Tell whether the units of an installation are active."""
    if places.root != Path("/") or not _SYSTEMD_RUNS.exists():
        return False
    asked = ["is-active", "--quiet", TARGET, "hwtpmd.socket", "hwtpmd.service"]
    return _systemctl(*asked).returncode == 0


def is_installed(places: Places) -> bool:
    """Tell whether the units of this very installation are there to be started."""
    units = Path(sys.prefix).parent / "systemd" / "system"
    return places.root == Path("/") and _SYSTEMD_RUNS.exists() and (units / TARGET).exists()


class SystemdStack:
    """Calls the methods of a stack that systemd runs; to be used like `LauncherClient`.

    Args:
        places: Of the installation.
    """

    def __init__(self, places: Places) -> None:
        self._places = places

    def call(
        self,
        method: str,
        /,
        progress: Progress | None = None,
        timeout_s: float = 0,
        **params: Any,  # noqa: ANN401 - as the method wants them
    ) -> Any:  # noqa: ANN401 - whatever the method gives
        """Call a method by its name; see `LauncherClient.call`.

        Raises:
            Failure: systemd or the method says so.
        """
        del timeout_s  # systemd has its own
        found = getattr(self, f"_do_{method}", None)
        given = {name: value for name, value in params.items() if value is not None}
        if found is None:
            raise _only_a_launcher(method)
        return found(progress or (lambda _: None), **given)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing is held."""

    # -- the methods -----------------------------------------------------------------------------

    def _do_power_on(self, progress: Progress) -> None:
        progress(f"starting {TARGET}")
        _ordered("start", TARGET)

    def _do_stop(self, progress: Progress) -> None:
        progress(f"stopping {TARGET}")
        # All by name: of the target alone, systemctl would only wait until it has begun.
        _ordered("stop", TARGET, *EVERYBODY)

    def _do_reload(self, _progress: Progress) -> None:
        from daemons.log_levels import read_levels  # noqa: PLC0415 - only needed here

        read_levels(self._places.log_levels)
        rows = [{"unit": "hwtpmd", **self._chip()}, *self._rows()]
        units = [f"{row['unit']}.service" for row in rows if row["pid"] is not None]
        _ordered("reload", *units)

    def _do_create(
        self, progress: Progress, *, config_text: str, path: str, paused: bool = False
    ) -> Row:
        from daemons.systemd.device_files import write_private  # noqa: PLC0415
        from daemons.systemd.domain_files import check_fits, unit_of  # noqa: PLC0415
        from daemons.xl.domain_config import parse_domain  # noqa: PLC0415 - slow to load

        config = parse_domain(config_text, path)
        check_fits(config)
        unit = unit_of(config.name, config.role)
        if _show(f"{unit}.service")["ActiveState"] not in {"inactive", "failed"}:
            raise Failure(
                f"cannot create {config.name}",
                why=f"it is there: {unit}.service is active",
                next_step=f"To make it anew: vtpm destroy {config.name}",
            )
        progress(f"putting its config file into {self._places.domains}")
        write_private(self._places.domains / f"{config.name}.cfg", config_text)
        _ordered("daemon-reload")
        _ordered("reset-failed", f"{unit}.service", f"{unit}.socket", may_fail=True)
        if paused:
            self._run_state().set_held(config.name, is_held=True)
        else:
            self._start(progress, unit)
        return self._row(config.name)

    def _do_destroy(self, progress: Progress, *, domain: str) -> None:
        found = self._find(domain)
        if found["is_held"]:
            self._run_state().set_held(found["name"], is_held=False)
        progress(f"stopping {found['unit']}.service")
        _ordered("stop", f"{found['unit']}.service", f"{found['unit']}.socket")

    _do_shutdown = _do_destroy

    def _do_reboot(self, progress: Progress, *, domain: str) -> Row:
        found = self._find(domain)
        if found["is_held"]:
            raise _cannot(f"reboot {found['name']}", "it is paused and has not been started")
        progress(f"restarting {found['unit']}.service")
        _ordered("restart", f"{found['unit']}.service")
        return self._row(found["name"])

    def _do_until_ready(self, progress: Progress, *, domain: str) -> None:
        found = self._find(domain)
        if found["state"] != "paused":
            self._start(progress, found["unit"])

    def _do_pause(self, _progress: Progress, *, domain: str) -> None:
        found = self._find(domain)
        if found["state"] == "paused":
            return
        if found["state"] != "running":
            raise _cannot(f"pause {found['name']}", f"it is {found['state']}")
        # Not SIGSTOP, of which the watchdog would not be told.
        _signal(found["unit"], "TSTP")
        from daemons.launcher.processes import is_stopped  # noqa: PLC0415 - slow to load

        if not _has_come(lambda: is_stopped(found["pid"])):
            raise _cannot(
                f"pause {found['name']}",
                f"its process {found['pid']} does not stop",
                f"systemctl status {found['unit']}.service tells how it is",
            )

    def _do_unpause(self, progress: Progress, *, domain: str) -> None:
        found = self._find(domain)
        if found["state"] == "paused" and not found["is_held"]:
            _signal(found["unit"], "CONT")
        elif found["state"] in {"paused", "shutdown"}:
            self._start(progress, found["unit"])
        elif found["state"] != "running":
            raise _cannot(f"unpause {found['name']}", f"it is {found['state']}")

    def _do_list(self, _progress: Progress) -> list[Row]:
        return [self._domain0(), *self._rows()]

    def _do_status(self, _progress: Progress) -> Row:
        from daemons.launcher.processes import pss_kib_of  # noqa: PLC0415 - only needed here

        launcher = self._domain0()
        launcher["root"] = str(self._places.root)
        rows = [launcher, self._chip(), *self._rows()]
        for row in rows:
            row["pss_kib"] = pss_kib_of(row["pid"]) if row["pid"] else None
        return {"launcher": rows[0], "chip": rows[1], "domains": rows[2:]}

    def _do_domid(self, _progress: Progress, *, name: str) -> int:
        return 0 if name == DOMAIN0_NAME else int(self._row(self._name(name))["domid"])

    def _do_guest_environment(self, _progress: Progress, *, domain: str) -> dict[str, str]:
        from daemons.guest.environment import guest_environment  # noqa: PLC0415 - only needed here

        return guest_environment(self._places, self._name(domain))

    def _do_platform_pcrs(self, _progress: Progress) -> list[str]:
        from daemons.systemd.platform import read_pcrs  # noqa: PLC0415 - slow to load

        return read_pcrs(self._places)

    def _do_vtpm_attach(
        self, _progress: Progress, *, domain: str, backend: str, uuid: str | None = None
    ) -> Row:
        from daemons.systemd.device_files import attach_vtpm  # noqa: PLC0415 - only needed here

        name = self._at_rest(domain, "attach a vTPM to")
        known = self._name(backend) if backend.isdecimal() and backend != "0" else backend
        attach_vtpm(self._places, name, known, uuid)
        _ordered("daemon-reload")
        return self._vtpm_rows(name)[-1]

    def _do_vtpm_detach(self, _progress: Progress, *, domain: str, devid_or_uuid: str) -> Row:
        from daemons.systemd.device_files import detach_vtpm  # noqa: PLC0415 - only needed here

        name = self._at_rest(domain, "detach a vTPM from")
        before = self._vtpm_rows(name)
        detach_vtpm(self._places, name, devid_or_uuid)
        _ordered("daemon-reload")
        return next(r for r in before if devid_or_uuid.lower() in {r["uuid"], str(r["idx"])})

    def _do_vtpm_list(self, _progress: Progress, *, domains: list[str]) -> list[Row]:
        return [row for name in domains for row in self._vtpm_rows(self._name(name))]

    def _do_block_attach(self, _progress: Progress, *, domain: str, spec: str) -> Row:
        from daemons.systemd.device_files import attach_disk  # noqa: PLC0415 - only needed here

        name = self._at_rest(domain, "attach a disk to")
        attach_disk(self._places, name, spec)
        _ordered("daemon-reload")
        return self._do_block_list(_progress, domain=name)[-1]

    def _do_block_list(self, _progress: Progress, *, domain: str) -> list[Row]:
        from daemons.launcher.device_rows import disk_row  # noqa: PLC0415 - only needed here
        from daemons.systemd.domain_files import path_of, read_file  # noqa: PLC0415

        found = self._find(domain)
        config, _ = read_file(path_of(self._places, found["name"]))
        return [disk_row(_end(found), disk) for disk in config.disks]

    def _at_rest(self, domain: str, what: str) -> str:
        """Give the name of a domain whose devices may change: one without a process."""
        from daemons.systemd.device_files import refused  # noqa: PLC0415 - only needed here

        found = self._find(domain)
        if found["pid"] is None and not found["state"].startswith(("starting", "restarting")):
            return str(found["name"])
        raise refused(
            f"{what} {found['name']}",
            f"it is {found['state']}, and domains look for their devices when they start",
            f"vtpm destroy {found['name']}; attach or detach; vtpm unpause {found['name']}",
        )

    def _vtpm_rows(self, name: str) -> list[Row]:
        from daemons.launcher.device_rows import vtpm_row  # noqa: PLC0415 - only needed here
        from daemons.registry import VtpmDevice  # noqa: PLC0415

        rows = {row["name"]: row for row in self._rows(with_resting=True)}
        listed = []
        for device in rows[name]["vtpms"]:
            uuid = UUID(device["uuid"])
            frontend = VtpmDevice(
                devid=device["devid"], backend=device["backend"], uuid=uuid, handle=device["devid"]
            )
            backend = rows.get(device["backend"])
            its_end = _end(backend) if backend is not None else None
            listed.append(vtpm_row(_end(rows[name]), frontend, its_end))
        return listed

    # -- what there is ---------------------------------------------------------------------------

    def _name(self, name_or_domid: str) -> str:
        return str(self._find(name_or_domid)["name"])

    def _start(self, progress: Progress, unit: str) -> None:
        progress(f"starting {unit}.service")
        _ordered("start", f"{unit}.socket", f"{unit}.service")

    def _run_state(self) -> RunState:
        from daemons.systemd.run_state import RunState  # noqa: PLC0415 - slow to load

        return RunState(self._places)

    def _find(self, name_or_domid: str) -> Row:
        rows = self._rows(with_resting=True)
        for row in rows:
            if name_or_domid in {row["name"], str(row["domid"])}:
                return row
        raise Failure(
            f"there is no domain {name_or_domid!a}",
            why=f"{self._places.domains} has: {', '.join(row['name'] for row in rows)}",
            next_step="`vtpm list` shows them; `vtpm create CFG` makes one",
            exit_code=ExitCode.UNAVAILABLE,
        )

    def _row(self, name: str) -> Row:
        return next(row for row in self._rows(with_resting=True) if row["name"] == name)

    def _rows(self, *, with_resting: bool = False) -> list[Row]:
        from daemons.registry import Registry  # noqa: PLC0415 - slow to load
        from daemons.systemd.domain_files import read_all, unit_of  # noqa: PLC0415

        configs, _ = read_all(self._places)
        state = self._run_state()
        units = {name: unit_of(name, config.role) for name, config in configs.items()}
        shown = _show_all([f"{unit}.service" for unit in units.values()])
        registry = Registry(self._places.registry)
        rows: list[Row] = []
        for name, config in configs.items():
            record = registry.get(name)
            properties = shown[f"{units[name]}.service"]
            is_held = properties["ActiveState"] == "inactive" and state.is_held(name)
            if properties["ActiveState"] == "inactive" and not (with_resting or is_held):
                continue
            rows.append(
                {
                    "name": name,
                    "unit": units[name],
                    "domid": record.domid if record is not None else None,
                    "label": record.label if record is not None else config.label,
                    "role": config.role.value,
                    **_life(properties),
                    **({"state": "paused"} if is_held else {}),
                    "is_held": is_held,
                    "memory": config.memory_mib,
                    "vif": [vif.text for vif in config.vifs],
                    "vtpms": _vtpms(config, record if properties["MainPID"] != "0" else None),
                    "backends": [device.backend for device in config.vtpms],
                    "boot_hash": record.boot_hash if record is not None else "",
                    "warnings": list(config.warnings),
                }
            )
        return sorted(rows, key=lambda row: row["domid"] or 0)

    def _domain0(self) -> Row:
        from daemons import policy  # noqa: PLC0415 - slow to load
        from daemons.registry import Role  # noqa: PLC0415

        return {
            "name": DOMAIN0_NAME,
            "domid": 0,
            "label": policy.load(self._places.policy).default_label(Role.DOMAIN0),
            "role": Role.DOMAIN0.value,
            "state": "running",
            "pid": 1,
            "restarts": 0,
            "last_reason": "",
            "status": "systemd, by the units of vtpm-stack.target",
            "memory": None,
            "vif": [],
            "vtpms": [],
            "backends": [],
            "warnings": [],
        }

    def _chip(self) -> Row:
        shown = _show_all(["hwtpmd.service", PLATFORM])
        chip, platform = shown["hwtpmd.service"], shown[PLATFORM]
        row = {"name": CHIP_NAME, "role": "hwtpm", **_life(chip)}
        row["is_powered"] = platform["ActiveState"] == "active"
        if row["state"] == "running" and not row["is_powered"]:
            said = platform["StatusText"] or platform["ActiveState"]
            row["state"] = f"starting: {PLATFORM}: {said}"
        return row


def _vtpms(config: DomainConfig, record: DomainRecord | None) -> list[Row]:
    """The TPM frontends of a domain: as it runs, or else as its file has them."""
    if record is not None:
        found = [(device.devid, device.backend, device.uuid) for device in record.vtpms]
    else:
        random = UUID(int=0)
        found = [(n, spec.backend, spec.uuid or random) for n, spec in enumerate(config.vtpms)]
    return [
        {"devid": devid, "backend": backend, "uuid": str(uuid)} for devid, backend, uuid in found
    ]


def _end(row: Row) -> End:
    from daemons.launcher.device_rows import UNKNOWN, End  # noqa: PLC0415 - only needed here

    domid = UNKNOWN if row["domid"] is None else int(row["domid"])
    return End(name=row["name"], domid=domid, is_running=row["state"] == "running")


def _life(properties: Properties) -> Row:
    from daemons.launcher.processes import is_stopped  # noqa: PLC0415 - slow to load

    state = _STATES.get(properties["ActiveState"], properties["ActiveState"])
    if state == "running" and is_stopped(int(properties["MainPID"] or 0)):
        state = "paused"
    if properties["SubState"] == "auto-restart":
        state = "restarting"
    reason = ""
    if state in {"failed", "restarting"}:
        reason = properties["StatusText"] or f"its unit ended with {properties['Result']}"
        state = f"{state}: {reason}"
    return {
        "state": state,
        "pid": int(properties["MainPID"] or 0) or None,
        "restarts": int(properties["NRestarts"] or 0),
        "last_reason": reason,
        "status": properties["StatusText"],
    }


def _show(unit: str) -> Properties:
    return _show_all([unit])[unit]


def _show_all(units: list[str]) -> dict[str, Properties]:
    if not units:
        return {}
    told = _systemctl("show", f"--property={_SHOWN}", *units)
    if told.returncode:
        raise _systemd_failed("show", told.stderr)
    blocks = (block.splitlines() for block in told.stdout.strip().split("\n\n"))
    found = [{line.partition("=")[0]: line.partition("=")[2] for line in block} for block in blocks]
    # One block a unit, in the order that was asked for.
    return dict(zip(units, found, strict=True))


def _ordered(*words: str, may_fail: bool = False) -> None:
    """Give systemd an order and wait until it is carried out."""
    done = _systemctl(*words)
    if done.returncode and not may_fail:
        reasons, statuses = [], [int(ExitCode.FAILED)]
        for unit in (word for word in words[1:] if not word.startswith("-") and "*" not in word):
            _has_come(lambda unit=unit: not _is_under_way(unit))  # type: ignore[misc]
            shown = _show(unit)
            if shown["ActiveState"] == "failed":
                reasons.append(f"{unit}: {shown['StatusText'] or shown['Result']}")
                statuses.append(int(shown["ExecMainStatus"] or 0))
        why = "; ".join(reasons) or done.stderr
        exit_code = ExitCode(statuses[-1]) if statuses[-1] in _TOLD else ExitCode.FAILED
        raise _systemd_failed(" ".join(words), why, exit_code)


def _is_under_way(unit: str) -> bool:
    """A start that was given up may be told before its unit has come to rest."""
    return _show(unit)["ActiveState"] in {"activating", "deactivating"}


def _signal(unit: str, name: str) -> None:
    _ordered("kill", "--kill-whom=main", f"--signal=SIG{name}", f"{unit}.service")


def _has_come(is_so: Callable[[], bool]) -> bool:
    """Wait for something that a process does because it was told to."""
    deadline = time.monotonic() + STOP_S
    while not is_so():
        if time.monotonic() > deadline:
            return False
        time.sleep(_LOOK_AGAIN_S)
    return True


def _systemctl(*words: str) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(  # noqa: S603 - words of our own
            ["systemctl", "--no-ask-password", *words],  # noqa: S607 - the system's
            capture_output=True,
            text=True,
            check=False,
        )
    except OSError as error:
        raise _systemd_failed(" ".join(words), error.strerror or str(error)) from error


def _systemd_failed(words: str, said: str, exit_code: ExitCode = ExitCode.FAILED) -> Failure:
    return Failure(
        f"systemctl {words} failed",
        why=" ".join(said.split()) or "it gives no reason",
        next_step="journalctl -b --unit UNIT tells more",
        exit_code=exit_code,
    )


def _cannot(
    what: str, why: str, next_step: str = "`vtpm list` shows the domains and their states"
) -> Failure:
    return Failure(f"cannot {what}", why=why, next_step=next_step)


def _only_a_launcher(method: str) -> Failure:
    return Failure(
        f"cannot do this ({method}) with a stack that systemd runs",
        why="its processes are those of its units, and no others",
        next_step="Do it in a stack of its own: vtpm up --root DIR CFG...",
        exit_code=ExitCode.USAGE,
    )
