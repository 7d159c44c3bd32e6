"""One vTPM: its encrypted image and the TPM that lives in it."""
