"""The command line. Heavy imports wait until a command needs them."""

from __future__ import annotations

import json
import os
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from fedpeft.deployment import command as deployment
from fedpeft.errors import FedPeftError, PlanError
from fedpeft.options import Log, LogForm

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Federated fine-tuning of foundation models with adapters.",
)

PlanFile = Annotated[Path, typer.Argument(metavar="PLAN", help="a plan file (YAML)")]
Lines = Annotated[
    list[str] | None,
    typer.Argument(metavar="[LINE=SPEC]...", help="plan lines that replace the file's"),
]
Exported = Annotated[Path, typer.Argument(metavar="RUN|FOLDER", help="a run or adapter folder")]
Threads = Annotated[
    int | None, typer.Option(min=1, help="CPU threads of torch, in each process that trains")
]
Device = Annotated[str, typer.Option(help="cpu, cuda or cuda:N")]
EngineSpec = Annotated[
    str, typer.Option("--engine", help="where clients run, such as 'inline(group=16)'")
]


@app.command()
def run(
    plan: PlanFile,
    lines: Lines = None,
    out: Annotated[Path | None, typer.Option(help="run folder [default: runs/<plan>]")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="go on with a run, if any")] = False,
    engine: EngineSpec = "inline",
    device: Device = "cpu",
    threads: Threads = None,
    log: Log = LogForm.text,
) -> None:
    """Simulate a plan: train, evaluate, leave a run folder."""
    from fedpeft.plan import Plan

    found = Plan.from_yaml(plan, _overrides(lines))
    folder, place = out or Path("runs") / plan.stem, _engine(engine, threads)
    from fedpeft.terminal import show_run

    _prepare(device, threads)
    from fedpeft.driver import simulate

    with show_run(folder, log) as watch:
        result = simulate(
            found, out=folder, resume=resume, device=device, engine=place, watch=watch
        )
        watch.finish(result)


@app.command()
def replay(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="the folder of a run on Flower")],
    lines: Lines = None,
    out: Annotated[Path | None, typer.Option(help="run folder [default: RUN-replayed]")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="go on with a replay, if any")] = False,
    engine: EngineSpec = "inline(group=1)",
    device: Device = "cpu",
    threads: Threads = None,
    log: Log = LogForm.text,
) -> None:
    """Simulate a run of real machines as it went, and tell whether its adapter is the same."""
    from fedpeft.plan import Plan
    from fedpeft.replay import replay as again
    from fedpeft.replay import threads_of

    found = Plan.from_yaml(run / "plan.yaml", _overrides(lines))
    folder, place = out or run.with_name(f"{run.name}-replayed"), _engine(engine, threads)
    from fedpeft.terminal import show_run

    _prepare(device, threads or threads_of(run))

    with show_run(folder, log) as watch:
        replayed = again(
            run, found, out=folder, resume=resume, engine=place, device=device, watch=watch
        )
        watch.finish(replayed.result)
    if not replayed.differ:
        typer.echo(f"{run}: the same adapter, bit for bit")
        return
    name, most = max(replayed.differ.items(), key=lambda item: item[1])
    typer.echo(f"{run}: {len(replayed.differ)} tensors differ, most {name} by {most:g}")
    raise typer.Exit(1)


@app.command()
def plan(
    plan: PlanFile,
    lines: Lines = None,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
    as_toml: Annotated[
        bool, typer.Option("--toml", help="print a run-config for flwr run")
    ] = False,
) -> None:
    """Check a plan and show what it would cost, without loading weights."""
    from fedpeft.plan import Plan
    from fedpeft.preview import as_text, preview

    try:
        found = Plan.from_yaml(plan, _overrides(lines))
        if as_toml:
            from fedpeft.flower.config import as_toml as toml

            typer.echo(toml(found), nl=False)
            return
        costs = preview(found)
    except FedPeftError as error:
        if not as_json:
            raise
        typer.echo(json.dumps({"ok": False, "problems": list(_problems(error))}, indent=1))
        raise typer.Exit(2) from None
    typer.echo(json.dumps({"ok": True, **costs}, indent=1) if as_json else as_text(costs))


@app.command()
@app.command("grid", hidden=True)
def sweep(
    file: Annotated[Path, typer.Argument(metavar="SWEEP", help="a sweep file (YAML)")],
    out: Annotated[Path | None, typer.Option(help="folder of runs [default: runs/<sweep>]")] = None,
    workers: Annotated[int, typer.Option(min=1, help="processes, each with a run at a time")] = 1,
    check: Annotated[bool, typer.Option("--check", help="only say what would be run")] = False,
    engine: EngineSpec = "inline",
    device: Device = "cpu",
    threads: Threads = None,
) -> None:
    """Run every combination of a sweep that is not finished yet, and write OUT/sweep.csv."""
    from fedpeft.sweep import command
    from fedpeft.sweep.place import Place

    place = Place(engine, _engine(engine, threads), device, threads, workers)
    if not check:
        _prepare(device, threads)
    if not command.sweep(file, out or Path("runs") / file.stem, place, check=check):
        raise typer.Exit(1)


@app.command()
def compare(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="runs, or folders of runs")],
) -> None:
    """Show runs side by side: what their plans differ in, and what came of them."""
    from fedpeft import compare as comparing
    from fedpeft.past_run import read_runs

    columns = comparing.columns(read_runs(runs))
    from fedpeft.terminal import show_columns

    show_columns([column.name for column in columns], dict(comparing.table(columns)))


@app.command()
def report(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="a run, or a sweep's folder")],
    out: Annotated[Path | None, typer.Option(help="new folder [default: DIR/report]")] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="replace a report that is there")
    ] = False,
) -> None:
    """Write a page in one file, plots and tables about a run or a sweep."""
    from fedpeft.reporting.command import report as write

    page = write(folder, out, lambda text: typer.echo(f"warning: {text}", err=True),
                 overwrite=overwrite)  # fmt: skip
    typer.echo(str(page))


@app.command("eval")
def evaluate(
    folder: Exported,
    data: Annotated[str | None, typer.Option(help="data line [default: the plan's]")] = None,
    task: Annotated[str | None, typer.Option(help="task line [default: the plan's]")] = None,
    model: Annotated[str | None, typer.Option(help="base model [default: the plan's]")] = None,
) -> None:
    """Evaluate an adapter on the test rows of a data line; print the metrics as JSON."""
    from fedpeft.inference import load_exported, rows_of

    rows = rows_of(data, given=True) if data else ()
    found = load_exported(folder, model=model, task=task, rows=rows)
    if not data and found.data is None:
        raise PlanError(f"{folder}: names no data; say --data")
    rows = rows or rows_of(str(found.data), given=False)
    metrics = found.evaluate(rows, lambda text: typer.echo(f"warning: {text}", err=True))
    typer.echo(json.dumps({"records": len(rows), **metrics}, indent=1))


@app.command()
def predict(
    folder: Exported,
    texts: Annotated[list[str] | None, typer.Argument(metavar="[TEXT|FILE]...")] = None,
    data: Annotated[str | None, typer.Option(help="data line whose rows to predict")] = None,
    tokens: Annotated[int, typer.Option(min=1, help="new tokens of a language model")] = 64,
) -> None:
    """Classify texts or image files, or continue texts; print one JSON line each."""
    from fedpeft.inference import load_exported, rows_of

    if bool(texts) == bool(data):
        raise PlanError("predict: give either texts, or --data with a data line")
    found = load_exported(folder)
    if found.classes:
        rows = [{found.column: text} for text in texts] if texts else rows_of(str(data), given=True)
        for answer in found.classify(rows):
            typer.echo(json.dumps(answer, ensure_ascii=False))
        return
    prompts = list(texts or []) or found.prompts(rows_of(str(data), given=True))
    for prompt, text in zip(prompts, found.generate(prompts, tokens), strict=True):
        typer.echo(json.dumps({"prompt": prompt, "text": text}, ensure_ascii=False))


@app.command()
def export(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="a run folder")],
    merged: Annotated[
        bool, typer.Option("--merged", help="fold the adapter into its base")
    ] = False,
    out: Annotated[Path | None, typer.Option(help="new folder [default: RUN/merged]")] = None,
) -> None:
    """Copy a run's adapter elsewhere, or write the merged model.

    Where the run is one of a sweep, the model card tells of the sweep's best ones as well.
    """
    import shutil

    from fedpeft.errors import RunError
    from fedpeft.export import merge
    from fedpeft.sweep.card import frontier_section

    adapter = run / "adapter"
    if not adapter.is_dir():
        raise RunError(f"{run}: holds no adapter; give a run folder, finished with --resume")
    target = out or run / ("merged" if merged else "exported")
    if target.exists():
        raise RunError(f"{target}: exists; choose another --out")
    if merged:
        merge(adapter, target)
    else:
        shutil.copytree(adapter, target)
        if section := frontier_section(run):
            with (target / "README.md").open("a", encoding="utf-8") as card:
                card.write(section)
    typer.echo(str(target))


@app.command()
def spent(
    folder: Annotated[
        Path, typer.Argument(metavar="RUN|LEDGERS", help="a run, or a node's ledgers")
    ],
    delta: Annotated[float, typer.Option(help="of the promise")] = 1e-5,
) -> None:
    """Tell what clients have spent of their privacy, in all runs their ledgers have."""
    from fedpeft import ledger
    from fedpeft.errors import RunError

    if not 0 < delta < 1:
        raise RunError(f"--delta {delta:g} must be between 0 and 1")
    for line in ledger.spent(folder, delta, lambda text: typer.echo(f"warning: {text}", err=True)):
        if line["unit"] == ledger.NOTHING:
            typer.echo(
                f"{line['client']}  epsilon unbounded: {line['runs']} runs promised nothing; "
                f"data {line['data']}"
            )
            continue
        assumed = "".join(f"; assumes that {what}" for what in line["assumes"])
        typer.echo(
            f"{line['client']}  epsilon {line['epsilon']:.3f} at delta {delta:g} in "
            f"{line['rounds']} rounds of {line['runs']} runs; hidden: {line['unit']} "
            f"from {line['adversary']}; data {line['data']}{assumed}"
        )


@app.command()
def warm(
    folder: Annotated[
        Path | None, typer.Option(help="of its socket [default: $FEDPEFT_WARM]")
    ] = None,
    idle: Annotated[float, typer.Option(min=1, help="seconds until it gives the base back")] = 1800,
    state: Annotated[bool, typer.Option("--state", help="say how the one that runs is")] = False,
) -> None:
    """Keep a Flower node's base loaded: what its messages ask for is done in this process."""
    from fedpeft.warm.channel import Warm
    from fedpeft.warm.channel import folder as usual

    if state:
        for name, value in Warm(folder, wait=0).state().items():
            typer.echo(f"{name}: {value}")
        return
    from fedpeft.warm.service import serve

    serve(folder or usual(), idle)


@app.command()
def watch(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="a run, or a folder of runs")],
    host: Annotated[str, typer.Option(help="where to listen")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any that is free")] = 8765,
    metrics: Annotated[
        bool, typer.Option("--metrics", help="serve /metrics for Prometheus")
    ] = False,
    log: Log = LogForm.text,
) -> None:
    """Show runs in a browser, live: a page for reading, on this machine only."""
    from fedpeft.dashboard.command import watch as serve

    serve(folder, host=host, port=port, metrics=metrics, log=log)


@app.command()
def parts(
    family: Annotated[str | None, typer.Argument(help="a family, such as aggregators")] = None,
    name: Annotated[str | None, typer.Argument(help="one of its methods")] = None,
) -> None:
    """List the methods a plan can name; those of one FAMILY with their papers; all about one."""
    from fedpeft import catalogue

    if family is None:
        for each in catalogue.families():
            typer.echo(f"{each}: {', '.join(catalogue.listed(each))}")
    elif name is None:
        found = list(catalogue.summaries(family))
        width = max((len(each) for each, _ in found), default=0)
        for each, line in found:
            typer.echo(f"{each:{width}}  {line}")
    else:
        typer.echo(catalogue.about(family, name))


@app.command()
def certs(
    out: Annotated[Path, typer.Option(help="folder of the authority, or of a site to --probe")],
    server: Annotated[
        str, typer.Option(metavar="HOST,...", help="how sites reach the server")
    ] = "",
    sites: Annotated[str, typer.Option(metavar="NAME,...", help="sites to make keys for")] = "",
    days: Annotated[int, typer.Option(min=1, help="for which a new certificate is good")] = 730,
    owner: Annotated[
        str, typer.Option(metavar="NAME", help="whose key signs runs; needs no authority")
    ] = "",
    probe: Annotated[
        str, typer.Option(metavar="HOST:PORT", help="try a server's certificate instead")
    ] = "",
) -> None:
    """Make an authority, a server's certificate, sites' and owners' keys; overwrite nothing."""
    from fedpeft.addresses import split_address
    from fedpeft.deployment.certificates import make
    from fedpeft.deployment.handshake import probe as shake

    if probe and (server or sites or owner):
        raise PlanError("--probe: makes nothing; leave out --server, --sites and --owner")
    if probe:
        good = shake(*split_address(probe), out / "ca.crt")
        typer.echo(f"{probe}: the server of this authority, its certificate good until {good:%F}")
        return
    hosts, names = ([w.strip() for w in text.split(",") if text] for text in (server, sites))
    if server or sites or not owner:
        for line in make(out, hosts, names, days):
            typer.echo(line)
    if owner:
        from fedpeft.deployment.signing import make_owner

        typer.echo(make_owner(out, owner))


deployment.add_to(app)


@app.command()
def client(
    file: Annotated[Path, typer.Argument(metavar="CLIENT", help="a client.yaml")],
    check: Annotated[
        bool, typer.Option("--check", help="only look, and say what was found")
    ] = False,
    log: Log = LogForm.text,
) -> None:
    """Join a federation with this machine's own records, and stay until it is ended."""
    from fedpeft.deployment.client import look, serve
    from fedpeft.deployment.client_file import load_client
    from fedpeft.deployment.voice import Voice
    from fedpeft.logs import JsonLog

    voice = Voice(JsonLog() if log is LogForm.json else None)
    (look if check else serve)(load_client(file), voice)


@app.command()
def gain(
    file: Annotated[Path, typer.Argument(metavar="CLIENT", help="a client.yaml")],
    run: Annotated[str, typer.Argument(metavar="RUN", help="a run that this site took part in")],
) -> None:
    """Train alone on this site's records; tell what a run has gained it. It stays at the site."""
    from fedpeft.deployment.client_file import load_client
    from fedpeft.gain import gain as compare
    from fedpeft.site_report import statements, table

    found = compare(load_client(file), run, lambda text: typer.echo(text, err=True))
    for line in (*table(found.report), "", *statements(found.report)):
        typer.echo(line)
    typer.echo(f"report: {found.folder / 'README.md'}")


def main() -> None:
    """Run the command line; a user's mistake is one line and exit status 2."""
    # torch's threads wait actively: briefly, or a busy machine slows them by an order of magnitude
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    try:
        app()
    except FedPeftError as error:
        for problem in _problems(error):
            typer.echo(f"error: {problem}", err=True)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
    except OSError as error:
        if error.errno is None:
            raise
        typer.echo(f"error: {error.strerror}: {error.filename or 'no file'}", err=True)
        sys.exit(2)


def _problems(error: FedPeftError) -> tuple[str, ...]:
    return error.problems if isinstance(error, PlanError) else (str(error),)


def _overrides(lines: list[str] | None) -> dict[str, Any]:
    found = {}
    for text in lines or []:
        name, equals, value = text.partition("=")
        if not equals or not name.isidentifier():
            raise PlanError(f"{text!r}: write LINE=SPEC, as in aggregator='mean'")
        found[name] = value
    return found


def _engine(spec: str, threads: int | None) -> Any:
    """Build an engine; its workers have ``threads`` each where the spec does not say how many."""
    from fedpeft.spec import build

    try:
        found = build("engine", spec)
    except FedPeftError as error:
        raise PlanError(f"--engine: {error}") from None
    unsaid = getattr(found, "threads", 1) is None
    return replace(found, threads=threads) if unsaid else found


def _prepare(device: str, threads: int | None) -> None:
    import torch

    if threads is not None:
        torch.set_num_threads(threads)
    try:
        chosen = torch.device(device)
    except RuntimeError:
        raise PlanError(f"--device {device}: write cpu, cuda or cuda:N") from None
    if chosen.type not in ("cpu", "cuda"):
        raise PlanError(f"--device {device}: write cpu, cuda or cuda:N")
    if chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count():
        raise PlanError(f"--device {device}: torch sees no CUDA device here; use --device cpu")
