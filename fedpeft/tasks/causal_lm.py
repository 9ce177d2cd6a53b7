"""Language modelling: plain texts, completions, instructions and chats."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np

from fedpeft.data._formats import TEMPLATES, detect, messages, sample
from fedpeft.errors import DataError, SpecError
from fedpeft.spec import bounded, method, nearest
from fedpeft.tasks._tokens import Draft, allowance, chat, fit, joined, padded, too_long
from fedpeft.types import Example, Metrics, Row

if TYPE_CHECKING:
    import torch

_IGNORED = -100


@method
class CausalLm:
    """Next-token prediction on what a model should say, not on what it is told.

    ``format`` is read off the columns of the first row: ``messages``; ``prompt`` and
    ``completion``; ``instruction``, perhaps ``input``, and ``output``; or the column ``text``.
    Completions and plain texts end with the tokenizer's end-of-text token. ``chat_template``
    replaces the tokenizer's: "plain", "chatml", Jinja text or a file of it. ``max_length`` cuts
    longer records, in tokens: from the end until half of ``max_length`` is left of the completion,
    then from the beginning of the prompt. Without it a record longer than the model's limit is an
    error.
    """

    max_length: int | None = bounded(default=None, low=2)
    format: Literal["auto", "text", "completion", "instruct", "chat"] = "auto"
    text: str = "text"
    chat_template: str | None = None

    def check(self) -> None:
        """Refuse a chat template that is neither known, nor Jinja text, nor a file."""
        self._template()

    measures: ClassVar[Sequence[str]] = ("loss", "perplexity", "token_accuracy")

    @property
    def head(self) -> Literal["causal-lm"]:
        """The ``transformers`` auto class to load."""
        return "causal-lm"

    @classmethod
    def paths(cls, given: Mapping[str, Any]) -> Sequence[str]:
        """Return the path of a chat template, where it is one."""
        template = given.get("chat_template")
        return [template] if isinstance(template, str) and not _is_text(template) else []

    def carried(self) -> CausalLm:
        """Return it with the text of the file of its chat template, where it has one."""
        text = self._template()
        is_file = self.chat_template is not None and not _is_text(self.chat_template)
        return replace(self, chat_template=text) if is_file and _is_jinja(text or "") else self

    def labels(self, rows: Sequence[Row]) -> None:
        """Return ``None``: texts have no labels."""

    def classes(self, rows: Sequence[Row]) -> Sequence[str]:
        """Return nothing: the classes are the tokenizer's."""
        return []

    def encode(
        self, rows: Sequence[Row], tokenizer: Any, limit: int, classes: Sequence[str]
    ) -> Sequence[Example]:
        """Tokenise: ``input_ids`` and ``labels`` [T], int64, labels -100 where nothing is learned.

        Raises ``DataError`` naming the row for a missing or wrong column, a chat that the template
        cannot render, a record that is too long, and one with no token to learn.
        """
        cap = allowance(self.max_length, limit)
        drafts = self._drafts(rows, tokenizer) if rows else []
        examples: list[Example] = []
        for number, draft in enumerate(drafts, 1):
            if not draft.learn[1:].any():
                raise DataError(f"row {number} has no token to learn; remove the row")
            if len(draft.ids) > cap and self.max_length is None:
                raise too_long(number, len(draft.ids), cap)
            ids, learn = fit(draft, cap, tokenizer.bos_token_id)
            examples.append({"input_ids": ids, "labels": np.where(learn, ids, _IGNORED)})
        return examples

    def prompts(self, rows: Sequence[Row], tokenizer: Any) -> list[str]:
        """Return what a model would be told before it answers each row.

        Raises ``DataError`` naming the row where there is nothing to tell.
        """
        found = []
        for number, row in enumerate(rows, 1):
            kind = detect(row, self.text) if self.format == "auto" else self.format
            if kind == "chat":
                turns = list(messages(row, number))
                while turns and turns[-1]["role"] == "assistant":
                    turns.pop()
                options = {"tokenize": False, "add_generation_prompt": True}
                template = self._template() or tokenizer.chat_template
                text = tokenizer.apply_chat_template(turns, chat_template=template, **options)
            else:
                given = sample(row, number, kind, self.text)
                text = given.prompt or given.completion
            if not text.strip():
                raise DataError(f"row {number} holds no prompt; fill it or remove the row")
            found.append(str(text))
        return found

    def collate(
        self, examples: Sequence[Example], pad: int
    ) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """Pad on the right: ``input_ids`` and labels [b, T], int64.

        There is no attention mask: no token looks to its right, where the padding is.
        """
        inputs = {"input_ids": padded([example["input_ids"] for example in examples], pad)}
        return inputs, padded([example["labels"] for example in examples], _IGNORED)

    def positions(self, labels: torch.Tensor) -> torch.Tensor:
        """Return where the next token is learned, bool [b, T]."""
        import torch

        end = torch.full_like(labels[:, :1], _IGNORED)
        return torch.cat([labels[:, 1:], end], dim=1) != _IGNORED

    def losses(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Return the mean over each record's learned tokens [b], in nats; at least float32.

        ``logits`` [b, T, V], or [n, V] at :meth:`positions`, predict the next token. A mean over
        the batch's tokens would let a record's gradient depend on the others, and differential
        privacy would not hold.
        """
        import torch

        where = self.positions(labels)
        chosen, targets = _learned(logits, labels, where)
        each = torch.nn.functional.cross_entropy(chosen, targets, reduction="none")
        spread = each.new_zeros(where.shape).masked_scatter(where, each)
        return spread.sum(dim=1) / where.sum(dim=1).clamp(min=1)

    def tally(self, logits: torch.Tensor, labels: torch.Tensor) -> Metrics:
        """Return sums over the learned tokens of the batch."""
        import torch

        chosen, targets = _learned(logits, labels, self.positions(labels))
        loss = torch.nn.functional.cross_entropy(chosen, targets, reduction="none")
        return {
            "loss_sum": float(loss.double().sum()),
            "tokens": float(len(targets)),
            "correct": float((chosen.argmax(dim=1) == targets).sum()),
        }

    def metrics(self, tally: Metrics) -> Metrics:
        """Return ``loss`` in nats per token, its ``perplexity`` and ``token_accuracy``.

        A token counts the same in every record, unlike in :meth:`losses`. Raises ``DataError``
        where nothing was tallied.
        """
        tokens = tally.get("tokens", 0.0)
        if not tokens:
            raise DataError("there is no record to evaluate; give data with a test split")
        loss = tally["loss_sum"] / tokens
        return {
            "loss": loss,
            "perplexity": math.exp(min(loss, 700.0)),
            "token_accuracy": tally["correct"] / tokens,
        }

    def _template(self) -> str | None:
        given = self.chat_template
        if given is None or _is_text(given):
            return TEMPLATES.get(given or "", given)
        try:
            if Path(given).is_file():
                return Path(given).read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            why = error.strerror if isinstance(error, OSError) else "not UTF-8"
            shown = given[:200]
            raise SpecError(f"causal_lm: chat_template={shown!r} cannot be read ({why})") from None
        raise SpecError(
            f"causal_lm: chat_template={given!r} is no file, no Jinja text and no known template"
            f"{nearest(given, list(TEMPLATES))}"
        )

    def _drafts(self, rows: Sequence[Row], tokenizer: Any) -> list[Draft]:
        kind = detect(rows[0], self.text) if self.format == "auto" else self.format
        if kind == "chat":
            template = self._template()
            return [
                chat(messages(row, number), number, tokenizer, template)
                for number, row in enumerate(rows, 1)
            ]
        return joined(
            [sample(row, number, kind, self.text) for number, row in enumerate(rows, 1)], tokenizer
        )


def _is_text(template: str) -> bool:
    """Tell whether a chat template is what it says, or known by its name; else it is a file."""
    return template in TEMPLATES or _is_jinja(template)


def _is_jinja(template: str) -> bool:
    return "{{" in template or "{%" in template


def _learned(
    logits: torch.Tensor, labels: torch.Tensor, where: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return logits [n, V] and targets [n] of the n learned tokens.

    Only learned rows are copied: with a large vocabulary the logits are most of the memory of a
    step.
    """
    import torch

    if logits.dim() > 2:
        logits = logits.flatten(0, 1).index_select(0, where.flatten().nonzero().squeeze(1))
    exact = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return exact, labels[:, 1:][where[:, :-1]]
