"""A whole federation on this machine, of the processes that users start."""
