"""One file per codec; tensors to arrays in wire dtypes. Codecs chain with ``|``."""
