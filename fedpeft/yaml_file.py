"""Files of lines ``name: value``: plans, and the settings of machines."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fedpeft.errors import FedPeftError


def read_mapping(path: str | Path, error: type[FedPeftError], what: str) -> dict[str, Any]:
    """Read a YAML file of lines; ``what`` says in the message what it should be.

    Raises ``error`` naming the file, and the place of what is no YAML or is there twice.
    """
    import yaml

    class _Loader(yaml.SafeLoader):
        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            names = [key.value for key, _ in node.value]
            if twice := [name for name in names if names.count(name) > 1]:
                raise yaml.MarkedYAMLError(
                    problem=f"{twice[0]!r} is given twice", problem_mark=node.start_mark
                )
            return super().construct_mapping(node, deep)

    try:
        text = Path(path).read_text(encoding="utf-8")
        found = yaml.load(text, _Loader)
    except FileNotFoundError:
        raise error(f"{path}: no such file") from None
    except (OSError, UnicodeDecodeError) as why:
        raise error(f"{path}: cannot be read ({why})") from None
    except (yaml.YAMLError, ValueError, RecursionError) as why:
        mark = getattr(why, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark else str(path)
        raise error(f"{where}: not YAML ({getattr(why, 'problem', why)})") from None
    if not isinstance(found, dict) or not all(isinstance(k, str) for k in found):
        raise error(f"{path}: {what} is a list of lines 'name: value'")
    return found
