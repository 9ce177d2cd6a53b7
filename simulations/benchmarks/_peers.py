"""Federated LoRA as a careful user of PEFT writes it: the other side of the engine benchmark.

One PeftModel stays in memory; a client copies the shared adapter into its parameters, takes a
fresh optimizer, trains, and copies them out. The server averages in numpy. Data, batches and
cohorts are those of the plan, so the result must be that of fedpeft.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fedpeft.adapters._targets import ATTENTION
from fedpeft.adapters.lora import Lora
from fedpeft.federation import deal
from fedpeft.models._locate import locate
from fedpeft.plan import Plan
from fedpeft.site import encode
from fedpeft.trainers.plain import Plain
from fedpeft.types import Example, Tensors
from simulations.benchmarks._workloads import cohort, order

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class PeftTrainer:
    """A resident PeftModel. In bfloat16 the base is, and PEFT keeps the low-rank factors float32.

    ``tensors`` are fedpeft's names for the adapter. Raises ``ValueError`` for a plan of another
    kind: this knows plain SGD on LoRA.
    """

    def __init__(
        self,
        plan: Plan,
        classes: Sequence[str],
        tensors: Iterable[str],
        precision: str,
        device: str,
    ) -> None:
        from peft import LoraConfig, get_peft_model

        adapter, trainer = plan.adapter, plan.trainer
        if not isinstance(adapter, Lora) or not isinstance(trainer, Plain) or _special(trainer):
            raise ValueError("the peer knows lora and plain SGD with a constant rate only")
        self._plan, self._lr, self._device = plan, trainer.lr, device
        base, self._pad = _load(plan, classes, precision)
        attention = adapter.targets == "attention"
        heads = {name.rpartition(".")[0] for name in tensors if ".lora_" not in name}
        config = LoraConfig(
            r=adapter.r,
            lora_alpha=int(adapter.alpha),
            target_modules=list(ATTENTION) if attention else adapter.targets,
            modules_to_save=sorted(heads) or None,
        )
        self._model = get_peft_model(base, config).eval().to(device)
        named = self._model.named_parameters()
        self._trained = {_ours(name): value for name, value in named if value.requires_grad}
        if {*self._trained} != {*tensors}:
            raise ValueError("PEFT trains other parameters than the plan")

    def train(
        self, tensors: Tensors, examples: Sequence[Example], batches: Iterable[NDArray[np.int64]]
    ) -> Tensors:
        """Return the adapter after a step on each batch."""
        task, parameters = self._plan.task, self._trained
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(torch.from_numpy(tensors[name]))
        optimizer = torch.optim.SGD(parameters.values(), self._lr)
        for rows in batches:
            inputs, labels = task.collate([examples[i] for i in rows], self._pad)
            placed = {name: value.to(self._device) for name, value in inputs.items()}
            logits = self._model(**placed).logits
            loss = task.losses(logits, labels.to(self._device)).mean()
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        return {k: p.detach().float().cpu().numpy().copy() for k, p in parameters.items()}


def one_by_one(
    plan: Plan, initial: Tensors, precision: str, device: str, done: Callable[[Tensors], None]
) -> None:
    """Run the plan; ``done`` gets the shared adapter before round 0 and after every round."""
    federation = deal(plan)
    texts = encode(plan, federation).train
    trainer = PeftTrainer(plan, federation.classes, initial, precision, device)
    shared = initial
    done(shared)
    for round in range(plan.rounds):

        def replies(at: Tensors = shared, round: int = round) -> Iterator[tuple[float, Tensors]]:
            for client in cohort(plan, federation.population, round):
                examples = [texts[i] for i in federation.train[client].tolist()]
                lengths = [len(example["input_ids"]) for example in examples]
                batches = order(plan, client, round, lengths)
                yield float(len(examples)), trainer.train(at, examples, batches)

        shared = average(replies())
        done(shared)


def average(replies: Iterable[tuple[float, Tensors]]) -> Tensors:
    """Return the mean of the adapters, weighted by records; float32, summed in float64."""
    total: dict[str, NDArray[np.float64]] = {}
    weights = 0.0
    for weight, tensors in replies:
        weights += weight
        for name, value in tensors.items():
            total[name] = total.get(name, 0.0) + weight * value.astype(np.float64)
    return {name: (value / weights).astype(np.float32) for name, value in total.items()}


def _load(plan: Plan, classes: Sequence[str], precision: str) -> tuple[Any, int]:
    """Return the base model and the token that pads."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    auto = {
        "sequence-classification": transformers.AutoModelForSequenceClassification,
        "causal-lm": transformers.AutoModelForCausalLM,
    }[plan.task.head]
    source = locate(plan.model).source
    labels = {"num_labels": len(classes)} if classes else {}
    base = auto.from_pretrained(source, dtype=DTYPES[precision], **labels)
    base.config.use_cache = False
    tokenizer = transformers.AutoTokenizer.from_pretrained(source)
    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    return base, int(pad)


def _special(trainer: Plain) -> bool:
    plain = Plain(optimizer="sgd", lr=trainer.lr, batch=trainer.batch, steps=trainer.steps)
    return trainer != plain


def _ours(name: str) -> str:
    """Return fedpeft's name of a PEFT parameter."""
    short = name.removeprefix("base_model.model.")
    return short.replace(".modules_to_save.default.", ".").replace(".default.", ".")
