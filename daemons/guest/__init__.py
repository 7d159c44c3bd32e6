"""A guest: the measuring loader and the tpm0 device."""
