"""PCR values and, where known, what set them.

Who measured says what was measured (the guest's loader its list, the launcher's firmware the
platform's event log); the PCR proves it or not. So each list is replayed, and a PCR that holds
something else says so.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from daemons.cli.guests import guest_row, tpm0_of
from daemons.cli.options import Domain, Json, Root, ask, places_of
from daemons.cli.output import print_json, print_rows
from daemons.errors import ExitCode, Failure

PCR_COUNT: Final = 24
HWTPM: Final = "hwtpm"
_RESET_VALUES: Final = (bytes(20), b"\xff" * 20)


@dataclass(frozen=True, slots=True, kw_only=True)
class Extended:
    """One event that somebody claims to have extended a PCR with.

    Attributes:
        pcr: Its index.
        digest: 20 bytes.
        text: What was measured, for people.
    """

    pcr: int
    digest: bytes
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class PcrReport:
    """One PCR, explained as far as it can be.

    Attributes:
        events: What is known to have extended it, in order.
        is_explained: The events give exactly this value. None: no events are known.
    """

    pcr: int
    value: bytes
    events: tuple[Extended, ...]
    is_explained: bool | None

    @property
    def set_by(self) -> str:
        """What set it, in words."""
        if not self.events:
            return "" if self.value in _RESET_VALUES else "not known"
        texts = "; ".join(event.text for event in self.events)
        return texts if self.is_explained else f"{texts}; and others since"


def show_pcrs(domain: Domain, as_json: Json = False, root: Root = None) -> None:
    """Print PCR values and what set them.

    DOMAIN is a guest, or hwtpm for the hardware TPM.
    """
    reports = chip_reports(root) if domain == HWTPM else guest_reports(domain, root)
    if as_json:
        print_json([_as_json(report) for report in reports])
        return
    print_rows(
        ("PCR", "Value", "Set by"), [(r.pcr, r.value.hex(), r.set_by or " ") for r in reports]
    )


def explain(
    values: Sequence[bytes], events: Iterable[Extended], replayed: Mapping[int, bytes]
) -> list[PcrReport]:
    """Put events beside the PCRs they went into, and say which PCRs they explain.

    Args:
        values: The PCRs from 0 on, 20 bytes each.
        events: In the order in which they were extended.
        replayed: What each PCR would hold if the events were all that happened.
    """
    known = tuple(events)
    reports = []
    for pcr, value in enumerate(values):
        mine = tuple(event for event in known if event.pcr == pcr)
        is_explained = replayed[pcr] == value if mine else None
        reports.append(PcrReport(pcr=pcr, value=value, events=mine, is_explained=is_explained))
    return reports


def read_pcrs(exchange: Callable[[bytes], bytes]) -> list[bytes]:
    """Read all PCRs over a way to a TPM."""
    from daemons.world import SystemRng  # noqa: PLC0415 - as below
    from tpm12.client import TpmClient  # noqa: PLC0415 - 60 ms that `--help` need not pay

    tpm = TpmClient(exchange, rng=SystemRng())
    return [tpm.pcr_read(pcr) for pcr in range(PCR_COUNT)]


def guest_reports(domain: str, root: str | None) -> list[PcrReport]:
    """Read a guest's PCRs and explain them by what its loader measured.

    Raises:
        Failure: No such guest, it does not run, or its list is damaged.
    """
    from daemons.guest.measurements import read_measurements, replay  # noqa: PLC0415
    from daemons.guest.tpm0_client import Tpm0Client  # noqa: PLC0415

    name = guest_row(domain, root)["name"]
    directory = places_of(root).domain(name).directory
    try:
        measured = read_measurements(directory)
    except (ValueError, PermissionError) as error:
        raise Failure(
            f"cannot read what {name} measured",
            why=f"{directory / 'measurements.json'}: {error}",
            next_step=f"vtpm reboot {name} writes it again",
            exit_code=ExitCode.DAMAGED,
        ) from error
    events = [
        Extended(pcr=m.pcr, digest=bytes.fromhex(m.digest), text=_told(m.what, m.name))
        for m in measured
    ]
    replayed = {
        pcr: replay(event.digest for event in events if event.pcr == pcr)
        for pcr in range(PCR_COUNT)
    }
    with Tpm0Client(tpm0_of(domain, root)) as tpm0:
        return explain(read_pcrs(tpm0.exchange), events, replayed)


def chip_reports(root: str | None) -> list[PcrReport]:
    """Read the hardware TPM's PCRs and explain them by the platform's event log.

    Raises:
        Failure: The stack is not up, the chip has no power, or the log is damaged.
    """
    from daemons.launcher.event_log import (  # noqa: PLC0415
        read_log,
        replay,
        since_last_launch,
    )

    values = [bytes.fromhex(value) for value in ask(root, "platform_pcrs")]
    logged = read_log(places_of(root).event_log) or []
    events = [
        Extended(pcr=event.pcr_index, digest=event.digest, text=event.text)
        for event in since_last_launch(logged)
    ]
    return explain(values, events, replay(logged))


def _told(what: str, name: str) -> str:
    if what == "command line":
        return f'command line "{name}"'
    return f"no {what}" if name == "none" else f"{what} {name}"


def _as_json(report: PcrReport) -> dict[str, Any]:
    return {
        "pcr": report.pcr,
        "value": report.value.hex(),
        "set_by": [{"what": event.text, "digest": event.digest.hex()} for event in report.events],
        "explained": report.is_explained,
    }
