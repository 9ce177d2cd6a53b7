"""Flower's SuperLink behind the gate: ``-m fedpeft.flower.superlink TOKEN PARENT ARGUMENT...``.

It takes the arguments of ``flower-superlink``. Of Flower's inside it knows only that uvicorn serves
it; ``fedpeft server`` asks at each start whether the gate is really there. It ends with its parent,
the process of that number.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

_LOOK = 0.5


def serve(token: Path, parent: int, arguments: Sequence[str]) -> None:
    """Run the SuperLink until it, or ``parent``, ends.

    ``token`` is a file whose content opens what is ours.
    """
    # before what takes long: a parent that has died until then would never be missed
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    import uvicorn

    from fedpeft.deployment.files import read
    from fedpeft.deployment.gate import Gate

    plain, secret = uvicorn.run, read(token, private=True).decode().strip()

    def guarded(app: Any, **options: Any) -> None:
        # a forwarded address is what a stranger says
        options |= {"proxy_headers": False, "server_header": False, "access_log": False}
        plain(Gate(app, secret), **options)

    uvicorn.run = guarded
    from flwr.superlink.cli.flower_superlink import flower_superlink

    sys.argv = ["flower-superlink", *arguments]
    flower_superlink()


def _end_with(parent: int) -> None:
    """End this process when its parent is gone: the next one starts another."""
    while os.getppid() == parent:
        time.sleep(_LOOK)
    os._exit(1)


if __name__ == "__main__":
    serve(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:])
