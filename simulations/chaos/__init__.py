"""A federation whose processes are killed all the time, and whose result must not show it."""
