"""Trackers: who is told of a run's rounds besides its folder."""
