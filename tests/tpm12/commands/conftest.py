"""TPMs whose NV memory is locked."""

import pytest

from tests.tpm12.makers import lock_nv


@pytest.fixture
def locked(owned):
    """An owned TPM with nvLocked."""
    lock_nv(owned.tpm).ok()
    return owned


@pytest.fixture
def unowned(fresh):
    """A TPM with nvLocked and without an owner, in the presence of someone."""
    lock_nv(fresh.tpm).ok()
    fresh.present()
    return fresh
