"""The processes: everything that touches sockets, files, clocks and other processes."""
