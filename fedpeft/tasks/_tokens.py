"""What the tasks share about tokens: limits, joining prompts and answers, chats, padding."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fedpeft.data._formats import Messages, Sample
from fedpeft.errors import DataError

if TYPE_CHECKING:
    import torch

_MARKERS = re.compile(r"\{%-?\s*generation\s*-?%\}")


class Draft(NamedTuple):
    """A tokenised record: ``ids`` int64 [T] and ``learn`` bool [T], true where loss is taken."""

    ids: NDArray[np.int64]
    learn: NDArray[np.bool_]


def allowance(max_length: int | None, limit: int) -> int:
    """Return the most tokens of a record. Raises ``DataError`` where the model takes fewer."""
    if max_length is not None and max_length > limit:
        raise DataError(
            f"max_length={max_length} is more than the {limit} tokens the model takes; "
            f"set max_length={limit}"
        )
    return limit if max_length is None else max_length


def too_long(number: int, length: int, limit: int) -> DataError:
    """Return the error for a record longer than the model's limit when no cut was asked for."""
    return DataError(
        f"row {number} is {length} tokens long and the model takes {limit}; "
        f"set max_length={limit} to cut longer rows"
    )


def fit(draft: Draft, cap: int, bos: int | None) -> Draft:
    """Cut a record to ``cap >= 2`` tokens, at least one of which is learned.

    The end goes first, until ``cap // 2`` tokens are left from the first learned one on (or all
    there are); then the beginning goes, but for a first token ``bos``. Without that reserve a
    long prompt would leave a single token to learn.
    """
    ids, learn = draft
    if len(ids) <= cap:
        return draft
    first = 1 + int(np.argmax(learn[1:]))  # what comes first is predicted from nothing
    end = max(cap, first + min(len(ids) - first, cap // 2))
    head = int(end > cap and ids[0] == bos)
    keep = np.r_[0:head, end - cap + head : end]
    return Draft(ids[keep], learn[keep])


def joined(samples: Sequence[Sample], tokenizer: Any) -> list[Draft]:
    """Tokenise prompts with their completions, which end with the end-of-text token if any.

    A prompt keeps the tokens that it has by itself, as at inference: where a token would cross
    the border, the completion is tokenised alone. The tokenizer decides on a first BOS token.
    """
    head = _head(tokenizer)
    prompts = _ids(tokenizer, [s.prompt for s in samples])
    wholes = _ids(tokenizer, [s.prompt + s.completion for s in samples])
    drafts = []
    for each, prompt, whole in zip(samples, prompts, wholes, strict=True):
        border = len(prompt)
        crossed = whole[:border] != prompt
        answer = _ids(tokenizer, [each.completion])[0] if crossed else whole[border:]
        if tokenizer.eos_token_id is not None and answer[-1:] != [tokenizer.eos_token_id]:
            answer = [*answer, tokenizer.eos_token_id]
        ids = np.asarray([*head, *prompt, *answer], dtype=np.int64)
        drafts.append(Draft(ids, np.arange(len(ids)) >= len(head) + border))
    return drafts


def chat(turns: Messages, number: int, tokenizer: Any, template: str | None) -> Draft:
    """Tokenise a chat; what the assistant says is learned, with the end of its turn.

    A template with ``{% generation %}`` markers says itself what that is. Otherwise a turn is what
    the template adds to the messages before it and the generation prompt. Raises ``DataError``
    where there is no template, it fails, or it changes earlier turns when one is added.
    """
    from jinja2 import TemplateError

    try:
        source = tokenizer.get_chat_template(template)
    except ValueError:
        raise DataError(
            f"row {number} is a chat and the tokenizer has no chat template; "
            'set chat_template="plain", "chatml" or a file'
        ) from None
    read = _marked if _MARKERS.search(source) else _grown
    try:
        return read(turns, number, tokenizer, template)
    except TemplateError as error:
        raise DataError(f"row {number}: the chat template fails: {error}") from None


def padded(rows: Sequence[NDArray[np.int64]], value: int) -> torch.Tensor:
    """Stack arrays [T_i] as one int64 tensor [b, max T_i], filled with ``value`` on the right."""
    import torch

    out = np.full((len(rows), max(map(len, rows), default=0)), value, dtype=np.int64)
    for line, row in zip(out, rows, strict=True):
        line[: len(row)] = row
    return torch.from_numpy(out)


def _ids(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    if not texts:
        return []
    made = tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)
    ids: list[list[int]] = made["input_ids"]
    return ids


def _head(tokenizer: Any) -> list[int]:
    """Return [BOS] for a tokenizer that starts texts with it, else nothing."""
    bos = tokenizer.bos_token_id
    return [bos] if bos is not None and tokenizer("a")["input_ids"][:1] == [bos] else []


def _marked(turns: Messages, number: int, tokenizer: Any, template: str | None) -> Draft:
    made = tokenizer.apply_chat_template(
        turns,
        chat_template=template,
        tokenize=True,
        return_dict=True,
        return_assistant_tokens_mask=True,
    )
    learn = np.asarray(made["assistant_masks"], dtype=np.bool_)
    # Where a span starts at a space that the tokenizer leaves out of its offsets, transformers
    # drops that turn and all later ones without a word.
    found = int(np.sum(learn & ~np.r_[False, learn[:-1]]))
    roles = ["", *(turn["role"] for turn in turns)]
    wanted = sum(b == "assistant" != a for a, b in itertools.pairwise(roles))
    if found < wanted:
        raise DataError(
            f"row {number}: the chat template marks {found} of {wanted} assistant turns; "
            "remove empty messages and spaces that start one"
        )
    return Draft(np.asarray(made["input_ids"], dtype=np.int64), learn)


def _grown(turns: Messages, number: int, tokenizer: Any, template: str | None) -> Draft:
    def render(upto: int, prompt: bool = False) -> str:
        text: str = tokenizer.apply_chat_template(
            turns[:upto], chat_template=template, tokenize=False, add_generation_prompt=prompt
        )
        return text

    if turns[0]["role"] == "assistant":
        raise DataError(f"row {number} starts with the assistant; put a user's message before it")
    whole = render(len(turns))
    spans = [_span(render, i, whole, number) for i in _assistant(turns)]
    made = tokenizer(whole, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    start, end = np.asarray(made["offset_mapping"], dtype=np.int64).reshape(-1, 2).T
    end = np.maximum(end, start + 1)
    learn = np.zeros(len(start), dtype=np.bool_)
    for low, high in spans:
        learn |= (end > low) & (start < high)
    return Draft(np.asarray(made["input_ids"], dtype=np.int64), learn)


def _assistant(turns: Messages) -> list[int]:
    return [i for i, turn in enumerate(turns) if turn["role"] == "assistant"]


def _span(render: Callable[..., str], i: int, whole: str, number: int) -> tuple[int, int]:
    """Return where message ``i`` begins and ends in ``whole``, in characters."""
    before, after = render(i, prompt=True), render(i + 1)
    if not (after.startswith(before) and whole.startswith(after)):
        raise DataError(
            f"row {number}: the chat template writes message {i + 1} differently when messages "
            'follow; use a template with {% generation %} markers, or chat_template="plain"'
        )
    return len(before), len(after)
