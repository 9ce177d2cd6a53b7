"""Methods that look for good values of a plan's lines."""
