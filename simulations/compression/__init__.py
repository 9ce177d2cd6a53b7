"""Accuracy against uplink bytes, for every codec with and without error feedback."""
