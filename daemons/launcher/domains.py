"""The domains of a platform: create, destroy, shutdown, reboot, pause, unpause, as xl means them.

Each operation is done when it returns, not begun: `create` returns a domain that is ready (or
paused, if so asked), `shutdown` and `destroy` leave nothing of it behind.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Awaitable, Callable
from functools import partial
from uuid import UUID

import trio

from daemons.errors import ExitCode, Failure
from daemons.launcher.adoption import (
    OldStack,
    living_process,
    say_adopted,
    say_destroyed,
    say_left,
    what_keeps_down,
)
from daemons.launcher.chip import Chip
from daemons.launcher.consequences import forget_journal
from daemons.launcher.domain import STOP_ORDER, Domain
from daemons.launcher.launching import (
    BACKEND_ROLES,
    check_disks,
    keep_for_the_next_launcher,
    launch_domain,
    waits_for_somebody,
)
from daemons.launcher.process_states import RESTING, State
from daemons.launcher.processes import is_alive
from daemons.launcher.ready_marks import was_ready
from daemons.launcher.stack import DOMAINS_MAX, Stack
from daemons.launcher.supervisor import Launched, Supervisor, crashed
from daemons.launcher.waiting import wait_for_end
from daemons.launcher.wishes import Noted, Wish, note_restart, note_wish
from daemons.lean_structlog import structlog
from daemons.listeners import start_time_of
from daemons.places import CHIP_NAME, DOMAIN0_NAME, Places
from daemons.policy import NotAllowed
from daemons.registry import DomainRecord, Role
from daemons.xl.domain_config import Action, DomainConfig, parse_domain

Progress = Callable[[str], Awaitable[None]]

log = structlog.get_logger()


class Domains:
    """Makes and ends domains.

    Args:
        stack: Of the launcher.
        chip: What everything stands on.
    """

    def __init__(self, stack: Stack, chip: Chip) -> None:
        self._stack = stack
        self._chip = chip
        self._is_stopping = False

    # -- create ----------------------------------------------------------------------------------

    async def create(
        self, progress: Progress, config_text: str, path: str, *, paused: bool = False
    ) -> Domain:
        """Create a domain, and return when it is ready.

        Args:
            progress: Told what it waits for.
            config_text: Its xl config file.
            path: Where the file is, for messages.
            paused: Make it, but do not start it before `unpause`.

        Raises:
            Failure: The config is wrong, an image or a backend is missing, or the domain cannot
                run. A domain that failed after it was made stays, with its reason, until it is
                destroyed or created again.
        """
        config = parse_domain(config_text, path)
        if config.role is Role.MANAGER and not paused:
            await self._chip.power_on(progress)
        await self._make_room(config.name)
        domain = self._new_domain(config, config_text, path)
        check_disks(self._stack, domain)
        supervisor = Supervisor(
            config.name,
            partial(launch_domain, self._stack, self._chip, domain),
            self._stack.settings.supervisor,
            self._stack.changes,
            config.on_crash,
        )
        supervisor.before_keeping = partial(self._note_crash, config.name)
        domain.supervisor = supervisor
        self._stack.registry.put(domain.record(None, None))
        self._stack.domains[config.name] = domain
        for warning in config.warnings:
            log.warning("config", domain=config.name, warning=warning)
        self._stack.changes.announce()
        if not paused:
            # From now on it is there, also for another launcher.
            try:
                keep_for_the_next_launcher(self._stack, domain)
            except BaseException:
                self._forget(domain)
                raise
            self._begin(domain)
            await self._until_ready(progress, domain)
        return domain

    async def adopt(self, old: OldStack) -> None:
        """Take over what an earlier launcher has left; all of it goes on as it was.

        Raises:
            Failure: What is known of the platform cannot be read; nothing was touched.
        """
        places = self._stack.places
        await self._chip.adopt(living_process(places, old.chip))
        self._stack.skip_domids(old.domids_given)
        for record in old.domains:
            try:
                config_text = old.configs.get(record.name)
                if config_text is None:
                    say_left(record, None)
                    self._stack.registry.remove(record.name)
                else:
                    self._adopt(record, config_text, old.wishes.get(record.name))
            except Failure as failure:
                say_left(record, failure)
        say_adopted([CHIP_NAME, *self._stack.domains])
        self._stack.changes.announce()

    def _adopt(self, record: DomainRecord, config_text: str, noted: Noted | None) -> None:
        stack, config = self._stack, parse_domain(config_text, record.name)
        process = living_process(stack.places, record)
        kept = None
        if process is None:
            kept = what_keeps_down(stack.places, record, config.on_crash, noted)
        if kept is not None and kept.wish is Wish.CRASHED and config.on_crash is Action.DESTROY:
            say_destroyed(record.name)
            stack.registry.remove(record.name)
            remove_directory(stack.places, record.name)
            return
        domain = self._domain_of(record, config, config_text)
        first = [partial(self._first_start, domain, process, kept)]

        async def launch() -> Launched:
            if first:
                return await first.pop()()
            return await launch_domain(stack, self._chip, domain)

        domain.supervisor = Supervisor(
            record.name,
            launch,
            stack.settings.supervisor,
            stack.changes,
            config.on_crash,
        )
        domain.supervisor.before_keeping = partial(self._note_crash, record.name)
        # Who was ready may have been used, and is not started again without its journal.
        domain.supervisor.times_ready = int(was_ready(stack.places, record.name))
        stack.domains[record.name] = domain
        self._begin(domain)
        if process is not None and noted is not None and noted.wish is Wish.RESTART:
            stack.nursery.start_soon(self._restart_adopted, domain)

    def _domain_of(self, record: DomainRecord, config: DomainConfig, config_text: str) -> Domain:
        was_started = record.pid is not None
        domain = Domain(
            config=config,
            config_text=config_text,
            config_path=str(self._stack.places.domain(record.name).config),
            domid=record.domid,
            label=record.label,
            devices=record.vtpms,
            disks=config.disks,
            boot_hash=record.boot_hash,
            has_started=was_started,
            last_process=_process_of(record),
            power_cycle=self._chip.power_cycle if was_started else None,
        )
        domain.note_random_uuids()
        return domain

    async def _first_start(
        self, domain: Domain, process: Callable[[], Launched] | None, kept: Noted | None
    ) -> Launched:
        """Take the place of the first start of a domain that is taken over: it is as it was."""
        if process is not None:
            return process()
        if kept is None:
            return await launch_domain(self._stack, self._chip, domain)
        if kept.wish is Wish.PRESERVED:
            domain.supervisor.preserve()
            await trio.sleep_forever()  # which `preserve` has cancelled
        raise crashed(domain.name, kept.reason, domain.config.on_crash)

    async def _restart_adopted(self, domain: Domain) -> None:
        """Its launcher was killed when it had begun to end it, to start it again."""
        await self._stack.until(lambda: domain.has_process or domain.is_leaving)
        if domain.role is not Role.MANAGER:
            forget_journal(domain)
        domain.supervisor.restart("it was being restarted when its launcher was killed")

    def _note_crash(self, name: str, reason: str) -> None:
        """For another launcher, which would have to guess; if there is no room, it does."""
        try:
            note_wish(self._stack.places, name, Wish.CRASHED, reason)
        except Failure as failure:
            log.warning(failure.what, why=failure.why, domain=name)

    async def attach_external(self, config_text: str, pid: int) -> Domain:
        """Let a process that was not started here be a guest: for measurements and tests.

        Args:
            config_text: The guest's config; its disks are not looked at.
            pid: Of a process of this user.

        Raises:
            Failure: The config is not a guest's, a backend is missing or taken, or there is no such
                process.
        """
        config = parse_domain(config_text, "the external guest's config")
        start_time = start_time_of(pid)
        if start_time is None or not is_alive(pid, start_time):
            raise _cannot(f"attach process {pid} as {config.name}", "there is no such process")
        if os.stat(f"/proc/{pid}").st_uid != os.geteuid():  # noqa: PTH116 - one field of it
            raise _cannot(
                f"attach process {pid} as {config.name}",
                "it belongs to another user",
                exit_code=ExitCode.NO_PERMISSION,
            )
        if config.role is not Role.GUEST:
            raise _cannot(f"attach process {pid} as {config.name}", "its config is not a guest's")
        await self._make_room(config.name)
        domain = self._new_domain(config, config_text, "")
        for device in domain.devices:
            backend = self._stack.domains[device.backend]
            if not backend.is_running:
                why = f"its vTPM {backend.name} is {backend.shown_state}"
                raise _cannot(f"attach process {pid} as {config.name}", why)
        domain.external = (pid, start_time)
        self._stack.registry.put(domain.record(pid, start_time))
        self._stack.domains[config.name] = domain
        self._stack.nursery.start_soon(self._forget_when_gone, domain)
        self._stack.changes.announce()
        return domain

    def _new_domain(self, config: DomainConfig, config_text: str, path: str) -> Domain:
        domain = Domain(
            config=config,
            config_text=config_text,
            config_path=path,
            domid=self._stack.new_domid(),
            label=config.label or self._stack.policy.default_label(config.role),
            disks=config.disks,
        )
        managers = self._stack.of_role(Role.MANAGER)
        if config.role is Role.MANAGER and managers:
            raise _cannot(
                f"create {config.name}",
                f"the platform has its manager: {managers[0].name}",
                f"To replace it: vtpm destroy {managers[0].name}",
            )
        self._check_pages(domain)
        for spec in config.vtpms:
            backend = self.backend_for(domain, spec.backend)
            self.refuse_twin(domain, backend, spec.uuid)
            domain.attach(backend, spec.uuid)
        return domain

    def _check_pages(self, domain: Domain) -> None:
        """Refuse what the chip would refuse anyway: pages for a label that may not use them."""
        if not domain.config.localities:
            return
        try:
            self._stack.policy.check_labels(
                domain.record(None, None), self._chip.record(None, None)
            )
        except NotAllowed as refusal:
            raise Failure(
                f"cannot create {domain.name} with iomem=: {refusal.what}",
                why=refusal.why,
                next_step="Take iomem= out of its config file; or give it a seclabel= that may use"
                " the hardware TPM, or allow its type in etc/vtpm/policy.toml",
                exit_code=refusal.exit_code,
            ) from refusal

    def backend_for(self, domain: Domain, backend: str) -> str:
        """Check that a backend can serve a domain, and give its name.

        Args:
            domain: The frontend.
            backend: Name or domid.

        Raises:
            Failure: It does not exist, has another role, or serves another guest. Only a vTPM may
                be made before its
                manager: it waits.
        """
        what = f"connect {domain.name} to backend {backend}"
        wanted = BACKEND_ROLES.get(domain.role)
        if wanted is None:
            raise _cannot(what, f"{domain.name} is the manager, which uses the hardware TPM")
        if backend in {"0", DOMAIN0_NAME}:
            raise _cannot(
                what,
                "domain 0 serves no TPM here",
                f"Name the {wanted.value} with backend=NAME",
            )
        found = self._stack.domains.get(backend)
        if found is None and backend.isdecimal():
            found = self._stack.find(backend)
        if found is None:
            if domain.role is Role.VTPM:
                return backend
            raise _cannot(
                what,
                f"there is no domain {backend}",
                f"Create it first: vtpm create {backend}.cfg",
                ExitCode.UNAVAILABLE,
            )
        if found.role is not wanted:
            why = f"{found.name} is a {found.role.value}, not a {wanted.value}"
            raise _cannot(what, why, f"Name the {wanted.value} with backend=NAME")
        if domain.role is Role.GUEST:
            others = [o.name for o in self._stack.users_of(found.name) if o.name != domain.name]
            if others:
                raise _cannot(
                    what,
                    f"it is the TPM of {others[0]}; a vTPM is one machine's",
                    f"Give {domain.name} a vTPM of its own, or first: vtpm destroy {others[0]}",
                    ExitCode.UNAVAILABLE,
                )
        return found.name

    def refuse_twin(self, domain: Domain, backend: str, uuid: UUID | None) -> None:
        """Refuse a second domain that is the same vTPM to its manager: only one may live.

        Raises:
            Failure: There is one; it is named.
        """
        if domain.role is not Role.VTPM or uuid is None:
            return
        for other in self._stack.users_of(backend):
            if other is not domain and any(device.uuid == uuid for device in other.devices):
                raise _cannot(
                    f"connect {domain.name} to backend {backend}",
                    f"{other.name} is the vTPM with uuid {uuid}, and a vTPM lives once",
                    "Give each its own uuid (uuidgen makes one), or first:"
                    f" vtpm destroy {other.name}",
                    ExitCode.UNAVAILABLE,
                )

    async def _make_room(self, name: str) -> None:
        """Let a new domain take the place of one that has failed, and of no other.

        Whoever is first when the old one has ended has the place; nothing may be awaited between
        the end of this and the new domain's entry.
        """
        while True:
            if self._is_stopping:
                raise _cannot(f"create {name}", "the stack is stopping", "vtpm up starts it again")
            old = self._stack.domains.get(name)
            if old is None:
                break
            if old.external is not None or old.supervisor.state is not State.FAILED:
                raise _cannot(
                    f"create {name}",
                    f"a domain of this name exists (domid {old.domid}, {old.shown_state})",
                    f"To make it anew: vtpm destroy {name}",
                )
            await self._end(old, drain_s=0)
        if len(self._stack.domains) >= DOMAINS_MAX:
            raise _cannot(f"create {name}", f"there are {DOMAINS_MAX} domains already")

    async def until_ready(self, progress: Progress, domain: str) -> None:
        """Wait until a domain that is there runs, unless it is paused.

        Raises:
            Failure: See `create`.
        """
        found = self._stack.find(domain)
        if found.external is None and found.supervisor.state not in RESTING:
            await self._until_ready(progress, found)

    async def _until_ready(self, progress: Progress, domain: Domain) -> None:
        """Wait until a domain that was just started runs.

        Raises:
            Failure: It failed, was ended meanwhile, or waits for something that only a person can
                bring.
        """
        stack, supervisor = self._stack, domain.supervisor
        patience_until = trio.current_time() + stack.settings.backend_wait_s
        told = ""
        while supervisor.state not in {State.RUNNING, State.PAUSED}:
            has_ended = supervisor.state in {State.FAILED, State.ENDED}
            if has_ended and supervisor.failure is not None:
                raise supervisor.failure
            if domain.is_leaving or supervisor.state is State.ENDED:
                why = "it was ended while it started"
                raise _cannot(f"start {domain.name}", why, f"vtpm create {domain.config_path}")
            is_waiting = waits_for_somebody(stack, domain)
            if not is_waiting:
                patience_until = trio.current_time() + stack.settings.backend_wait_s
            elif trio.current_time() >= patience_until:
                raise Failure(
                    f"{domain.name} is created, but does not run yet",
                    why=f"it {supervisor.reason}",
                    next_step="It starts by itself when that is there; `vtpm status` shows it",
                    exit_code=ExitCode.UNAVAILABLE,
                )
            shown = supervisor.status_text or supervisor.reason or "starting"
            if shown != told:
                told = shown
                await progress(shown)
                continue
            with trio.move_on_at(patience_until):
                await stack.changes.next()

    # -- the other operations --------------------------------------------------------------------

    async def shutdown(self, progress: Progress, domain: str) -> None:
        """Ask a domain to end, wait for it, and do what its on_poweroff says.

        As a rule, and if it has ended before, nothing of it is left.
        """
        found = self._stack.find(domain)
        is_resting = found.external is not None or found.supervisor.state in RESTING
        action = Action.DESTROY if is_resting else found.config.on_poweroff
        await self._after_its_end(progress, found, action, "shutdown")

    async def destroy(self, progress: Progress, domain: str) -> None:
        """End a domain at once, and remove what it leaves."""
        found = self._stack.find(domain)
        await progress(f"ending {found.name}")
        await self._end(found, drain_s=self._stack.settings.destroy_drain_s)

    async def reboot(self, progress: Progress, domain: str) -> Domain:
        """Stop a domain, and do what its on_reboot says: as a rule, start it again.

        A guest's vTPM is reset with it. One that has ended before is started in any case.
        """
        found = self._supervised(domain)
        if found.supervisor.state is State.CREATED:
            raise _cannot(f"reboot {found.name}", "it is paused and has not been started")
        action = found.config.on_reboot if found.has_process else Action.RESTART
        await self._after_its_end(progress, found, action, "reboot")
        return found

    async def _after_its_end(
        self, progress: Progress, found: Domain, action: Action, asked: str
    ) -> None:
        """End a domain's process in order, and then destroy, preserve or start the domain."""
        drain_s = self._stack.settings.supervisor.drain_s
        if action is Action.DESTROY:
            await progress(f"stopping {found.name}")
            await self._end(found, drain_s=drain_s)
        elif action is Action.PRESERVE:
            await progress(f"stopping {found.name}, which is kept")
            found.supervisor.preserve(drain_s=drain_s)
            await found.supervisor.settled()
            if found.supervisor.state is State.PRESERVED:
                note_wish(self._stack.places, found.name, Wish.PRESERVED)
        else:
            await progress(f"rebooting {found.name}")
            await self._start_again(progress, found, f"{asked} was asked for")

    async def _start_again(self, progress: Progress, found: Domain, reason: str) -> None:
        starts = found.supervisor.starts
        note_restart(self._stack.places, found.name, found.config.on_crash)
        if found.role is not Role.MANAGER:  # what the chip holds for a manager, it still holds
            forget_journal(found)
        found.supervisor.restart(reason)
        await self._stack.until(
            lambda: (
                found.supervisor.starts > starts
                or found.supervisor.failure is not None
                or found.supervisor.state is State.ENDED
                or waits_for_somebody(self._stack, found)
            )
        )
        await self._until_ready(progress, found)

    async def pause(self, _progress: Progress, domain: str) -> None:
        """Stop a domain where it stands."""
        found = self._supervised(domain)
        if not found.supervisor.pause() and found.supervisor.state not in {
            State.PAUSED,
            State.CREATED,
        }:
            raise _cannot(f"pause {found.name}", f"it is {found.shown_state}")

    async def unpause(self, progress: Progress, domain: str) -> None:
        """Let a paused domain go on, or start one that was created paused."""
        found = self._supervised(domain)
        supervisor = found.supervisor
        if supervisor.state is State.CREATED and not found.is_leaving:
            if found.role is Role.MANAGER:
                await self._chip.power_on(progress)
            if not found.has_begun and not found.is_leaving:
                keep_for_the_next_launcher(self._stack, found)
                self._begin(found)
            await self._stack.until(
                lambda: supervisor.state is not State.CREATED or found.is_leaving
            )
            await self._until_ready(progress, found)
        elif not supervisor.unpause() and supervisor.state is not State.RUNNING:
            raise _cannot(f"unpause {found.name}", f"it is {found.shown_state}")

    async def stop_all(self, progress: Progress) -> None:
        """Stop every domain, guests first, and then the chip; nothing may be created meanwhile."""
        self._is_stopping = True
        drain_s = self._stack.settings.supervisor.drain_s
        for role in STOP_ORDER:
            domains = self._stack.of_role(role)
            if domains:
                await progress(f"stopping {', '.join(domain.name for domain in domains)}")
            async with trio.open_nursery() as nursery:
                for domain in domains:
                    nursery.start_soon(partial(self._end, domain, drain_s=drain_s))
        await progress("switching the hardware TPM off")
        await self._chip.power_off()

    def _supervised(self, name: str) -> Domain:
        domain = self._stack.find(name)
        if domain.external is not None:
            why = "its process was not started by the launcher"
            raise _cannot(f"do this with {domain.name}", why, "End the process itself")
        return domain

    # -- ends ------------------------------------------------------------------------------------

    async def _end(self, domain: Domain, *, drain_s: float) -> None:
        """End a domain for good: process, record, directory. Several may ask at once."""
        domain.is_leaving = True
        if domain.external is None:
            supervisor = domain.supervisor
            if domain.has_begun:
                supervisor.stop(drain_s=drain_s)
                await self._stack.until(lambda: supervisor.state is State.ENDED)
        self._forget(domain)

    def _begin(self, domain: Domain) -> None:
        """Let its process live from now on; once."""
        domain.has_begun = True
        self._stack.nursery.start_soon(self._live, domain)

    async def _live(self, domain: Domain) -> None:
        """Let a domain's process live; on_crash=destroy ends the domain with it."""
        await domain.supervisor.run()
        if not domain.is_leaving:
            domain.is_leaving = True
            self._forget(domain)

    def _forget(self, domain: Domain) -> None:
        if self._stack.domains.get(domain.name) is domain:
            del self._stack.domains[domain.name]
            self._stack.registry.remove(domain.name)
            remove_directory(self._stack.places, domain.name)
        self._stack.changes.announce()

    async def _forget_when_gone(self, domain: Domain) -> None:
        assert domain.external is not None
        pid, start_time = domain.external
        await wait_for_end(pid, start_time)
        self._forget(domain)


def _process_of(record: DomainRecord) -> tuple[int, int] | None:
    if record.pid is None or record.start_time is None:
        return None
    return record.pid, record.start_time


def remove_directory(places: Places, name: str) -> None:
    """Remove the run directory of an ended domain."""
    shutil.rmtree(places.domain(name).directory, ignore_errors=True)


def _cannot(
    what: str,
    why: str,
    next_step: str = "`vtpm list` shows the domains and their states",
    exit_code: ExitCode = ExitCode.FAILED,
) -> Failure:
    return Failure(f"cannot {what}", why=why, next_step=next_step, exit_code=exit_code)
