"""Domain configuration files as xl reads them: syntax, keys, devices, arguments. Pure."""
