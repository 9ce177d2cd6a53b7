"""A 4.3M-parameter Llama (4 layers, width 256) pretrained on public-domain English novels.

The project's own work (Apache-2.0), small enough to ship; byte-level BPE with 4,096 tokens,
context 512, stored in bfloat16.
"""

from __future__ import annotations

from pathlib import Path

ORIGIN = "tiny-novels"


def folder() -> Path:
    """Return the folder with the weights."""
    return Path(__file__).parent
