"""One TPM 1.2 as a pure state machine, shared by the chip and by every vTPM."""
