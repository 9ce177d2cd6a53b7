"""A federation of machines that belong to different owners: their keys and certificates."""
