"""What a program inside a guest finds in its environment, to get to the guest's tpm0."""

from __future__ import annotations

from daemons.places import Places


def guest_environment(places: Places, guest: str) -> dict[str, str]:
    """Give the variables of programs inside a guest."""
    tpm0 = str(places.domain(guest).tpm0)
    return {
        "TPM_DEVICE": tpm0,
        # TrouSerS' tcsd reads these two.
        "TCSD_USE_TCP_DEVICE": "1",
        "TCSD_UN_SOCKET_DEVICE_PATH": tpm0,
        "VTPM_ROOT": str(places.root),
        "VTPM_GUEST": guest,
    }
