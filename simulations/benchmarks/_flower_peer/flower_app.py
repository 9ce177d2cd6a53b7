"""PEFT under Flower's simulation: FedAvg over the Message API, as its templates write it.

``cached`` keeps the PeftModel in each worker; without it every ``train()`` loads tokenizer and
base, as FlowerTune does. A node plays whichever client the server names.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

from fedpeft.federation import Federation, deal
from fedpeft.models._base import load_tokenizer
from fedpeft.models._outline import outline
from fedpeft.plan import Plan
from fedpeft.types import Example, Tensors
from simulations.benchmarks._peers import PeftTrainer, average
from simulations.benchmarks._side import load, save
from simulations.benchmarks._workloads import cohort, order

client = ClientApp()  # Flower looks for such assignments in the text
server = ServerApp()


@server.main()
def main(grid: Grid, context: Context) -> None:
    """Average what the cohort trained, round by round; write when each round ended."""
    path = str(context.run_config["request"])
    request, plan, federation = _prepared(path)
    shared = load(Path(request["initial"]))
    while len(nodes := sorted(grid.get_node_ids())) < int(plan.cohort.expected(0)):
        time.sleep(0.1)
    times = [time.perf_counter()]
    for round in range(plan.rounds):
        chosen = cohort(plan, federation.population, round)
        arrays = _record(shared)
        messages = [
            Message(_content(arrays, name, round), dst_node_id=node, message_type="train")
            for node, name in zip(nodes, chosen, strict=True)
        ]
        replies = {r.metadata.src_node_id: r for r in grid.send_and_receive(messages)}
        if failed := [r.error for r in replies.values() if r.has_error()]:
            raise RuntimeError(f"{len(failed)} of {len(messages)} clients failed: {failed[0]}")
        shared = average(_read(replies[node]) for node in nodes)
        times.append(time.perf_counter())
    folder = Path(path).parent
    save(folder / f"after{plan.rounds}.npz", shared)
    answer = {"rounds": np.diff(times).tolist()}
    (folder / "answer.json").write_text(json.dumps(answer), encoding="utf-8")


@client.train()
def train(message: Message, context: Context) -> Message:
    """Play one client's round."""
    path = str(context.run_config["request"])
    asked = message.content.config_records["asked"]
    name, round = str(asked["client"]), int(str(asked["round"]))
    tensors = _tensors(message.content.array_records["arrays"])
    _, plan, _ = _prepared(path)
    examples = _examples(path, name)
    make = _trainer if context.run_config["cached"] else _trainer.__wrapped__
    batches = order(plan, name, round, [len(example["input_ids"]) for example in examples])
    trained = make(path, tuple(sorted(tensors))).train(tensors, examples, batches)
    content = {
        "arrays": _record(trained),
        "metrics": MetricRecord({"num-examples": len(examples)}),
    }
    return Message(RecordDict(content), reply_to=message)  # type: ignore[arg-type]


@lru_cache(maxsize=1)
def _prepared(path: str) -> tuple[dict[str, Any], Plan, Federation]:
    """Return the request, its plan and the dealt data, which a worker keeps."""
    request = json.loads(Path(path).read_text(encoding="utf-8"))
    plan = Plan.from_lines(request["lines"])
    return request, plan, deal(plan)


@lru_cache(maxsize=1)
def _trainer(path: str, names: Sequence[str]) -> PeftTrainer:
    request, plan, federation = _prepared(path)
    return PeftTrainer(plan, federation.classes, names, request["precision"], request["device"])


@cache
def _examples(path: str, name: str) -> Sequence[Example]:
    """Return a client's tokenised records, which a worker keeps."""
    _, plan, federation = _prepared(path)
    rows = [federation.splits.train[i] for i in federation.train[name].tolist()]
    limit = outline(plan.model, plan.task.head, len(federation.classes)).limit
    return plan.task.encode(rows, load_tokenizer(plan.model), limit, federation.classes)


def _content(arrays: ArrayRecord, name: str, round: int) -> RecordDict:
    return RecordDict({"arrays": arrays, "asked": ConfigRecord({"client": name, "round": round})})


def _record(tensors: Tensors) -> ArrayRecord:
    return ArrayRecord({k: torch.from_numpy(v) for k, v in tensors.items()})


def _tensors(record: ArrayRecord) -> Tensors:
    return {name: value.numpy() for name, value in record.to_torch_state_dict().items()}


def _read(reply: Message) -> tuple[float, Tensors]:
    weight = reply.content.metric_records["metrics"]["num-examples"]
    return float(str(weight)), _tensors(reply.content.array_records["arrays"])
