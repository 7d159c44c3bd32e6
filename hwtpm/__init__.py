"""The front of the hardware TPM: its TIS register file and the driver for it. Pure, without I/O."""
