"""Every error fedpeft raises on purpose. Each is also the builtin that Python users expect.

    FedPeftError
    ├── SpecError    a spec does not parse, names no method, or does not fit its fields
    ├── PlanError    the parts of a plan do not fit each other, or a line is missing or wrong
    ├── DataError    a file, column, label or text that the task cannot use
    ├── ModelError   a base model, tokenizer or adapter folder that cannot be used
    │   └── GroupError   a model or adapter whose clients cannot share a pass
    ├── TrainError   training that did not stay finite; a pass that does not fit into memory
    ├── BudgetError  training that would spend more privacy than was promised
    ├── SiteError    keys, certificates, settings or machines of a federation that cannot be used
    ├── WireError    bytes from outside that are not the expected packet
    └── RunError     a run folder that is in use, finished, changed, damaged or in the way
        └── DamagedError  a file of a run whose content is not what was written

The command line prints the message after ``error:`` and exits with status 2.
"""

from __future__ import annotations

_MOST_WORDS = 300
"""No reason that is kept is longer."""


class FedPeftError(Exception):
    """Base class; its message is one line that names the place, the value and the remedy."""


class SpecError(FedPeftError, ValueError):
    """A spec does not parse, names no method, or does not fit the method's fields."""


class PlanError(FedPeftError, ValueError):
    """The parts of a plan do not fit each other; ``problems`` lists every reason found."""

    def __init__(self, *problems: str) -> None:
        super().__init__("; ".join(problems))
        self.problems = problems


class DataError(FedPeftError, ValueError):
    """A file, column, label or text that the task cannot use."""


class ModelError(FedPeftError, ValueError):
    """A base model, tokenizer or adapter folder that cannot be used."""


class GroupError(ModelError):
    """A model or adapter whose clients cannot share a pass, though each alone can be trained."""


class TrainError(FedPeftError, ArithmeticError):
    """Training that did not stay finite, or a pass that does not fit into memory."""


class BudgetError(FedPeftError, PermissionError):
    """Training that would spend more privacy than a plan promises or a site allows."""


class SiteError(FedPeftError, OSError):
    """Keys, certificates, settings or machines of a federation that cannot be used."""


class WireError(FedPeftError, ValueError):
    """Bytes from outside that are not the expected packet."""


class RunError(FedPeftError, OSError):
    """A run folder that is in use, finished, changed, damaged or in the way."""


class DamagedError(RunError):
    """A file of a run whose content is not what was written."""


def printable(reason: str) -> str:
    """Return a reason that may be shown and stored, whatever somebody else put into it."""
    return "".join(c if c.isprintable() else "?" for c in reason)[:_MOST_WORDS]
