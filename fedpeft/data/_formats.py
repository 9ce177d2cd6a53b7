"""What a row of text data means: which text is given, which text is learned.

Pure functions of rows; no tokenizer. Rows are numbered from 1 in messages, as lines of a file are,
and a record's text is never quoted: an error may travel from a site to the server.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any, Literal, TypeAlias

from fedpeft.errors import DataError
from fedpeft.spec import nearest
from fedpeft.types import Row

Kind: TypeAlias = Literal["text", "completion", "instruct", "chat"]
Messages: TypeAlias = list[dict[str, Any]]

TEMPLATES: Mapping[str, str] = {
    "chatml": (
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' }}"
        "{% if m['role'] == 'assistant' %}"
        "{% generation %}{{ m['content'] + '<|im_end|>' }}{% endgeneration %}"
        "{% else %}{{ m['content'] + '<|im_end|>' }}{% endif %}{{ '\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    ),
    "plain": (
        "{% for m in messages %}{{ '### ' + (m['role'] | capitalize) + ':\\n' }}"
        "{% if m['role'] == 'assistant' %}"
        "{% generation %}{{ m['content'] + (eos_token or '') }}{% endgeneration %}"
        "{% else %}{{ m['content'] }}{% endif %}{{ '\\n\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '### Assistant:\\n' }}{% endif %}"
    ),
}
"""Built-in chat templates. ``chatml`` is for tokenizers that know its two markers; ``plain`` is for
any, and ends an answer with the tokenizer's end-of-text token."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One record as text: ``prompt`` (possibly empty) is given, ``completion`` is learned."""

    prompt: str
    completion: str


def detect(row: Row, text: str) -> Kind:
    """Guess the format from the columns of one row; ``text`` is the column of plain texts.

    The richest format wins, because sets of instructions often carry a joined ``text`` as well.
    Raises ``DataError`` listing the columns where none fits.
    """
    if "messages" in row:
        return "chat"
    if "prompt" in row and "completion" in row:
        return "completion"
    if "instruction" in row and "output" in row:
        return "instruct"
    if text in row:
        return "text"
    raise DataError(
        f"row 1 has the columns {', '.join(map(str, row))}, not {text!r}, 'prompt' and "
        "'completion', 'instruction' and 'output', or 'messages'; rename its columns"
    )


def sample(row: Row, number: int, kind: Kind, text: str) -> Sample:
    """Read a row of any format but ``chat``. Raises ``DataError`` naming row and column."""
    return _READERS[kind](row, number, text)


def messages(row: Row, number: int) -> Messages:
    """Read the ``messages`` of a chat: mappings with text under ``role`` and ``content``.

    Raises ``DataError`` naming row and message, also where no message is the assistant's.
    """
    turns = cell(row, number, "messages")
    if not isinstance(turns, Sequence) or isinstance(turns, str):
        raise DataError(
            f"row {number}: column 'messages' is {_show(turns)}, not a list of messages"
        )
    for place, turn in enumerate(turns, 1):
        for key in ("role", "content"):
            value = turn.get(key) if isinstance(turn, Mapping) else None
            if not isinstance(value, str):
                raise DataError(
                    f"row {number}: message {place} has {_show(value)} as its {key!r}, not text; "
                    "write {'role': ..., 'content': ...}"
                )
    if not any(turn["role"] == "assistant" for turn in turns):
        raise DataError(
            f"row {number} has no message of the role 'assistant', so no token to learn; "
            "name the answering role 'assistant' or remove the row"
        )
    return [dict(turn) for turn in turns]


def cell(row: Row, number: int, column: str) -> Any:
    """Return the value of a column. Raises ``DataError`` with the nearest column."""
    if column not in row:
        known = nearest(column, [str(name) for name in row])
        raise DataError(f"row {number} has no column {column!r}{known}")
    return row[column]


def text_of(row: Row, number: int, column: str) -> str:
    """Return the text in a column. Raises ``DataError`` where it is missing or not text."""
    value = cell(row, number, column)
    if not isinstance(value, str):
        raise DataError(
            f"row {number}: column {column!r} is {_show(value)}, not text; "
            "convert it or remove the row"
        )
    return value


def label_of(row: Row, number: int, column: str) -> str:
    """Return the label in a column as text. Raises ``DataError`` where it is missing."""
    value = cell(row, number, column)
    if not isinstance(value, str | Real) or value == "" or value != value:
        raise DataError(
            f"row {number}: column {column!r} is {_show(value)}, not one label; "
            "correct or remove the row"
        )
    return str(value)


def _text(row: Row, number: int, text: str) -> Sample:
    return Sample("", text_of(row, number, text))


def _completion(row: Row, number: int, text: str) -> Sample:
    return Sample(text_of(row, number, "prompt"), text_of(row, number, "completion"))


def _instruct(row: Row, number: int, text: str) -> Sample:
    blocks = [("Instruction", text_of(row, number, "instruction").strip())]
    if row.get("input") is not None and (extra := text_of(row, number, "input").strip()):
        blocks.append(("Input", extra))
    prompt = "".join(f"### {title}:\n{body}\n\n" for title, body in blocks)
    return Sample(prompt + "### Response:\n", text_of(row, number, "output"))


def _no_sample(row: Row, number: int, text: str) -> Sample:
    raise DataError(f"row {number} is a chat; read it with messages()")


_READERS: Mapping[Kind, Callable[[Row, int, str], Sample]] = {
    "text": _text,
    "completion": _completion,
    "instruct": _instruct,
    "chat": _no_sample,
}


def _show(value: Any) -> str:
    """Spell a value that is not text; only a small number is shown as it is."""
    if value is None or value == "" or isinstance(value, int | float):
        return repr(value)
    return f"a {type(value).__name__}"
