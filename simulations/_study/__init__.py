"""What studies share: pieces whose finished runs are kept and never repeated, and their command."""
