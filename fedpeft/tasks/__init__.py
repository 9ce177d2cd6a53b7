"""One file per task; what is learned, and how it is scored."""
