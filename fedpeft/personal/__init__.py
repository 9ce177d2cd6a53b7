"""One file per way to give clients adapters of their own, beside the shared one."""
