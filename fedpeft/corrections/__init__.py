"""One file per correction; what pulls local steps together."""
