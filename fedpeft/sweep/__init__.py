"""Many plans from one file: read, run in one process or several, told as a table."""
