// --- one run -------------------------------------------------------------------------------------
const LISTED = 200;
let run = null, drawn = new Map();

function stateText(told) { return make("span", { class: `state ${told.state}` }, told.state); }
function roundsText(told) { return told.rounds ? `${told.done} of ${told.rounds}` : String(told.done); }

function showRun() {
  show($("run"), true);
  document.title = `${run.name} · fedpeft`;
  write($("run-title"), run.name);
  $("run-line").replaceChildren(stateText(run), ` · round ${roundsText(run)}`, run.written ? ` · last round ${ago(run.written)}` : "",
    run.state === "stopped" ? " · nobody works on it; the command that began it goes on with --resume" : "");
  show($("progress"), run.rounds > 0);
  $("progress").max = run.rounds || 1; $("progress").value = run.state === "finished" ? run.rounds || 1 : run.done;
  $("told").replaceChildren(...run.told.map((text) => make("li", {}, text))); show($("told"), run.told.length > 0);
  $("tiles").replaceChildren(...run.tiles.map((tile) => make("div", {}, make("dt", {}, tile.label), make("dd", {}, tile.value), make("dd", { class: "of" }, tile.of))));
  const charts = run.length ? run.charts.map((told) => { const old = drawn.get(told.title); return old?.kind === JSON.stringify(told) ? old : new Chart(told); }) : [];
  drawn = new Map(charts.map((chart) => [chart.told.title, chart]));
  const figures = charts.map((chart) => chart.figure);
  if (figures.length !== $("charts").children.length || figures.some((figure, i) => figure !== $("charts").children[i])) $("charts").replaceChildren(...figures);
  for (const chart of charts) chart.update(run.columns);
  showClients(); showRounds();
  $("plan").querySelector("dl").replaceChildren(...Object.entries(run.plan).flatMap(([line, spec]) => [make("dt", {}, line), make("dd", {}, spec)]));
  show($("plan"), Object.keys(run.plan).length > 0);
}
function showClients() {
  const { rows, total } = run.clients;
  show($("clients"), total > 0);
  if (!total) return;
  const metric = rows.find((row) => row.metric)?.metric ?? "", rounds = rows[0].recent.length;
  write($("clients-metric"), metric);
  $("clients-legend").replaceChildren(strip("+"), make("span", {}, "reply used"), strip("x"), make("span", {}, "not used"), strip("."), make("span", {}, "not there"), `the last ${rounds} rounds`);
  fill($("clients").querySelector("tbody"), rows.map((row) => [row.name, row, () => [
    make("th", { scope: "row" }, row.name), make("td", {}, strip(row.recent)), cell(String(row.used), "n"), cell(String(row.refused), "n"),
    cell((row.up / 1e6).toFixed(2), "n"), cell((row.down / 1e6).toFixed(2), "n"), cell(row.value === null ? "" : row.value.toFixed(4), "n"), cell(row.reason, "why"),
  ]]));
  write($("clients-note"), rows.length < total ? `${rows.length} of ${total} clients are shown` : "");
}
function strip(marks) {
  const used = [...marks].filter((mark) => mark === "+").length, lost = [...marks].filter((mark) => mark === "x").length;
  const made = make("svg", { class: "strip", width: 6 * marks.length, height: 14, role: "img", "aria-label": `${used} used, ${lost} not used` });
  [...marks].forEach((mark, i) => {
    const flat = mark === ".";
    made.append(make("rect", { x: 6 * i, y: flat ? 6 : 1, width: 5, height: flat ? 2 : 12, rx: 1, class: mark === "+" ? "took" : "" }));
    if (mark === "x") made.append(make("path", { d: `M${6 * i + 0.5} 4.5l4 5m0 -5l-4 5` }));
  });
  return made;
}
function showRounds() {
  const place = $("table");
  show(place, run.length > 0);
  if (!place.open || !run.length) return;
  const names = ["round", ...Object.keys(run.columns).filter((name) => name !== "round").sort()];
  place.querySelector("thead tr").replaceChildren(...names.map((name) => make("th", { scope: "col", class: "n" }, name)));
  const rows = [];
  for (let i = run.length - 1; i >= Math.max(0, run.length - LISTED); i--) {
    const told = names.map((name) => { const value = run.columns[name]?.[i] ?? null; return value === null ? "" : name === "round" ? String(value + 1) : short(value); });
    rows.push([String(i), told, () => told.map((text) => cell(text, "n"))]);
  }
  fill(place.querySelector("tbody"), rows);
}
