"""Using a finished adapter: evaluate it on other data, or predict. PEFT applies it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedpeft.adapters._peft_folder import read_config
from fedpeft.data._batching import by_length, lengths_of
from fedpeft.errors import DataError, FedPeftError, ModelError
from fedpeft.export import PROVENANCE, provenance
from fedpeft.out_of_memory import evaluated_in_parts
from fedpeft.spec import build
from fedpeft.types import Metrics, Row, Task

_BATCH = 32
_PIECE = 1024
"""Images that are decoded at once."""


@dataclass(frozen=True, slots=True)
class Exported:
    """A model ready to use, with what is needed to feed it."""

    model: Any
    tokenizer: Any
    task: Task
    classes: tuple[str, ...]
    limit: int
    data: str | None

    def evaluate(
        self, rows: Sequence[Row], warn: Callable[[str], None] = lambda _: None
    ) -> Metrics:
        """Return the task's metrics over ``rows``; ``warn`` is told of passes too large for memory.

        Raises ``TrainError`` where one row does not fit.
        """
        device = next(self.model.parameters()).device
        batch = max(1, min(_BATCH, len(rows)))
        tally, _ = evaluated_in_parts(lambda n: self._tally(rows, n), batch, device, warn)
        return self.task.metrics(tally)

    def classify(self, rows: Sequence[Row]) -> list[dict[str, Any]]:
        """Return ``label`` and ``probability`` for each row; rows need no label."""
        column = getattr(self.task, "label", "label")
        asked = [{**row, column: self.classes[0]} for row in rows]
        found: dict[int, dict[str, Any]] = {}
        for logits, _, where in self._forward(asked):
            best = logits.float().softmax(-1).max(-1)
            for i, p, c in zip(where, best.values.tolist(), best.indices.tolist(), strict=True):
                found[i] = {"label": self.classes[c], "probability": round(p, 4)}
        return [found[i] for i in range(len(rows))]

    @property
    def column(self) -> str:
        """The column of what is classified: an image, or a text."""
        return str(getattr(self.task, "image", None) or getattr(self.task, "text", "text"))

    def prompts(self, rows: Sequence[Row]) -> list[str]:
        """Return what the rows ask of a language model. Raises ``DataError``."""
        task: Any = self.task
        return list(task.prompts(rows, self.tokenizer))

    def generate(self, prompts: Sequence[str], tokens: int) -> list[str]:
        """Return greedy continuations of at most ``tokens`` tokens."""
        texts = []
        for prompt in prompts:
            if not prompt.strip():
                raise DataError("the prompt is empty; give some text")
            inputs = self.tokenizer(prompt, return_tensors="pt")
            if inputs["input_ids"].shape[1] + tokens > self.limit:
                raise DataError(f"prompt and {tokens} new tokens exceed the limit of {self.limit}")
            output = self.model.generate(
                input_ids=inputs["input_ids"],
                attention_mask=inputs["attention_mask"],
                max_new_tokens=tokens,
                do_sample=False,
            )
            new = output[0, inputs["input_ids"].shape[1] :]
            texts.append(self.tokenizer.decode(new, skip_special_tokens=True))
        return texts

    def _tally(self, rows: Sequence[Row], batch: int) -> Metrics:
        total: dict[str, float] = {}
        for logits, labels, _ in self._forward(rows, batch):
            for name, value in self.task.tally(logits, labels).items():
                total[name] = total.get(name, 0.0) + value
        return total

    def _forward(
        self, rows: Sequence[Row], batch: int = _BATCH
    ) -> Iterator[tuple[Any, Any, list[int]]]:
        import torch

        pad = getattr(self.tokenizer, "pad_token_id", 0)
        most = _PIECE if self.task.head == "image-classification" else max(1, len(rows))
        for start in range(0, len(rows), most):
            part = rows[start : start + most]
            examples = self.task.encode(part, self.tokenizer, self.limit, self.classes)
            for where in by_length(lengths_of(examples), batch):
                inputs, labels = self.task.collate([examples[i] for i in where], pad)
                with torch.inference_mode():
                    logits = self.model(**inputs).logits
                yield logits, labels, [start + int(i) for i in where]


def load_exported(
    path: str | Path,
    *,
    model: str | None = None,
    task: str | None = None,
    rows: Sequence[Row] = (),
) -> Exported:
    """Load a run folder, its adapter folder, a merged model, or a PEFT folder made elsewhere.

    ``model`` and ``task`` replace what the folder says. A folder made elsewhere does not name its
    classes: they are those of ``rows``, sorted. Raises ``ModelError``.
    """
    from fedpeft.models._base import load_base

    folder = Path(path)
    if (folder / "adapter" / PROVENANCE).is_file():
        folder = folder / "adapter"
    elif (folder / "run.json").is_file():
        raise ModelError(f"{folder}: the run has no adapter yet; continue it with --resume")
    adapter = (folder / "adapter_config.json").is_file()
    if adapter and not (folder / PROVENANCE).is_file():
        about = _foreign(folder, task, rows)
    else:
        about = provenance(folder)
    lines = about["lines"]
    if task is None and ":" in lines["task"].partition("(")[0]:
        raise ModelError(
            f"{folder}: its task is code outside fedpeft ({lines['task']!r}); "
            "say --task if you trust it"
        )
    made = build("tasks", task or lines["task"])
    classes = tuple(about["classes"])
    source = model or (lines["model"] if adapter else str(folder.resolve()))
    base = load_base.__wrapped__(source, made.head, classes, "cpu")  # ours alone, to be edited
    loaded: Any = base.model
    if adapter:
        from peft import PeftModel

        try:
            loaded = PeftModel.from_pretrained(loaded, str(folder)).eval()
        except (RuntimeError, ValueError, OSError) as error:
            reason = str(error).strip().splitlines()[0][:200]
            raise ModelError(f"{folder}: does not fit the model {source!r} ({reason})") from None
    limit = base.outline.limit
    return Exported(loaded, base.tokenizer, made, classes, limit, lines.get("data"))


def rows_of(spec: str, *, given: bool) -> Sequence[Row]:
    """Return the test rows of a data line; of one ``given`` for this, else its only rows.

    Raises ``DataError`` where a run's own data has no test rows: those it trained on prove nothing.
    """
    try:
        splits = build("data", spec).load()
    except FedPeftError as error:
        raise type(error)(f"{'--data' if given else 'data'}: {error}") from error
    if splits.test is None and not given:
        raise DataError("the run's data has no test rows; give some with --data")
    rows: Sequence[Row] = splits.test if splits.test is not None else splits.train
    if not rows:
        raise DataError(f"--data: {spec} has no rows here; name a file that has some")
    return rows


def _foreign(folder: Path, task: str | None, rows: Sequence[Row]) -> dict[str, Any]:
    config = read_config(folder)
    spec = task or {"SEQ_CLS": "classify", "CAUSAL_LM": "causal_lm"}.get(
        str(config.get("task_type"))
    )
    if spec is None:
        raise ModelError(f"{folder}: its task type is not known here; say --task")
    made: Task = build("tasks", spec)
    if made.head != "causal-lm" and not rows:
        raise ModelError(f"{folder}: does not name its classes; give --data with labelled rows")
    lines = {"task": spec, "model": config.get("base_model_name_or_path")}
    return {"lines": lines, "classes": made.classes(rows) if rows else []}
