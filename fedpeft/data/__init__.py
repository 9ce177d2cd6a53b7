"""One file per data source; each reads records and leaves their meaning to the task."""
