"""Options that several commands have."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer


class LogForm(StrEnum):
    """How a command says what happens."""

    text = "text"
    json = "json"


Log = Annotated[
    LogForm, typer.Option(envvar="FEDPEFT_LOG", help="json: structured lines on standard error")
]
