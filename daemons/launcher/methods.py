"""The methods of the control socket: names, parameters, and what in the launcher does each."""

from __future__ import annotations

from collections.abc import Callable

from daemons import log_levels
from daemons.errors import ExitCode, Failure
from daemons.guest.environment import guest_environment
from daemons.launcher.chip import Chip
from daemons.launcher.control import Method, Parameter, Progress
from daemons.launcher.devices import Devices
from daemons.launcher.domains import Domains
from daemons.launcher.stack import Stack
from daemons.launcher.status import domain_row, list_rows, status_answer
from daemons.registry import Role

_DOMAIN = Parameter(name="domain", type=str)


class Methods:
    """All methods of one launcher.

    Args:
        stack: Of the launcher.
        chip: Its chip.
        domains: Its domains.
        devices: Their devices.
        end: Called when everything is stopped; the launcher then ends.
    """

    def __init__(
        self,
        stack: Stack,
        chip: Chip,
        domains: Domains,
        devices: Devices,
        end: Callable[[], None],
    ) -> None:
        self._stack = stack
        self._chip = chip
        self._domains = domains
        self._devices = devices
        self._end = end

    def table(self) -> dict[str, Method]:
        """Give them by name."""
        uuid = Parameter(name="uuid", type=str, is_required=False)
        backend = Parameter(name="backend", type=str)
        config_text = Parameter(name="config_text", type=str)
        return {
            "power_on": Method(run=self._power_on),
            "create": Method(
                run=self._create,
                parameters=(
                    config_text,
                    Parameter(name="path", type=str),
                    Parameter(name="paused", type=bool, is_required=False),
                ),
            ),
            "destroy": Method(run=self._domains.destroy, parameters=(_DOMAIN,)),
            "shutdown": Method(run=self._domains.shutdown, parameters=(_DOMAIN,)),
            "reboot": Method(run=self._reboot, parameters=(_DOMAIN,)),
            "pause": Method(run=self._domains.pause, parameters=(_DOMAIN,)),
            "unpause": Method(run=self._domains.unpause, parameters=(_DOMAIN,)),
            "until_ready": Method(run=self._domains.until_ready, parameters=(_DOMAIN,)),
            "reload": Method(run=self._reload),
            "list": Method(run=self._list),
            "status": Method(run=self._status),
            "domid": Method(run=self._domid, parameters=(Parameter(name="name", type=str),)),
            "stop": Method(run=self._stop),
            "attach_external": Method(
                run=self._attach_external,
                parameters=(config_text, Parameter(name="pid", type=int)),
            ),
            "vtpm_attach": Method(
                run=self._devices.vtpm_attach, parameters=(_DOMAIN, backend, uuid)
            ),
            "vtpm_list": Method(
                run=self._devices.vtpm_list, parameters=(Parameter(name="domains", type=list),)
            ),
            "vtpm_detach": Method(
                run=self._devices.vtpm_detach,
                parameters=(_DOMAIN, Parameter(name="devid_or_uuid", type=str)),
            ),
            "block_attach": Method(
                run=self._devices.block_attach,
                parameters=(_DOMAIN, Parameter(name="spec", type=str)),
            ),
            "block_list": Method(run=self._devices.block_list, parameters=(_DOMAIN,)),
            "guest_environment": Method(run=self._guest_environment, parameters=(_DOMAIN,)),
            "platform_pcrs": Method(run=self._platform_pcrs),
        }

    async def _power_on(self, progress: Progress) -> None:
        await self._chip.power_on(progress)

    async def _platform_pcrs(self, _progress: Progress) -> list[str]:
        """Give the chip's PCRs in hex, from 0 on."""
        values = await self._chip.read_pcrs()
        return [value.hex() for _, value in sorted(values.items())]

    async def _create(
        self, progress: Progress, config_text: str, path: str, paused: bool | None = None
    ) -> dict[str, object]:
        domain = await self._domains.create(progress, config_text, path, paused=bool(paused))
        return domain_row(domain)

    async def _reboot(self, progress: Progress, domain: str) -> dict[str, object]:
        return domain_row(await self._domains.reboot(progress, domain))

    async def _attach_external(
        self, _progress: Progress, config_text: str, pid: int
    ) -> dict[str, object]:
        return domain_row(await self._domains.attach_external(config_text, pid))

    async def _reload(self, _progress: Progress) -> None:
        """Let everybody log as the file says now; a wrong one is refused before anybody reads it.

        Raises:
            Failure: It is wrong.
        """
        log_levels.read_levels(self._stack.places.log_levels)
        log_levels.read_again()
        self._chip.supervisor.reload()
        for domain in self._stack.domains.values():
            if domain.external is None:
                domain.supervisor.reload()

    async def _list(self, _progress: Progress) -> list[dict[str, object]]:
        return list_rows(self._stack)

    async def _status(self, _progress: Progress) -> dict[str, object]:
        return status_answer(self._stack, self._chip)

    async def _domid(self, _progress: Progress, name: str) -> int:
        if name == "Domain-0":
            return 0
        return self._stack.find(name).domid

    async def _stop(self, progress: Progress) -> None:
        await self._domains.stop_all(progress)
        self._end()

    async def _guest_environment(self, _progress: Progress, domain: str) -> dict[str, str]:
        """Give what a program inside the guest finds in its environment."""
        guest = self._stack.find(domain)
        if guest.role is not Role.GUEST:
            raise Failure(
                f"{guest.name} has no tpm0",
                why=f"it is a {guest.role.value}, not a guest",
                next_step="Name a guest; `vtpm list` shows them",
                exit_code=ExitCode.USAGE,
            )
        return guest_environment(self._stack.places, guest.name)
