"""The manager: records of every vTPM, sealed to the hardware TPM."""
