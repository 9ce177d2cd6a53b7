"""The warm trainer: a process that plays a node's clients and keeps the base loaded."""
