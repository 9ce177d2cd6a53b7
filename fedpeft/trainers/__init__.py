"""One file per trainer; the local optimizer and its loop."""
