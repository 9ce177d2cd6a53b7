"""Base models: by hub id, by local folder, or embedded (one module per name, with ``folder()``)."""
