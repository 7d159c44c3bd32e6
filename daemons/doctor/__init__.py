"""What state each file of an installation is in, and what can be done. Changes nothing."""
