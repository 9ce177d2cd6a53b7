// --- the page of fedpeft watch: asks every two seconds -------------------------------------------
const PERIOD = 2000; // milliseconds from an answer to the next question

// --- which runs there are ------------------------------------------------------------------------
let listed = null;

function showList() {
  const { runs, note, folder, sites } = listed;
  write($("folder"), folder);
  write($("note"), note); show($("note"), !!note); show($("none"), !runs.length);
  show($("list"), runs.length !== 1 || runs[0].run !== ".");
  fill($("runs").tBodies[0], runs.map((told) => [told.run, told, () => [
    make("th", { scope: "row" }, make("a", { href: `#run=${encodeURIComponent(told.run)}` }, told.name)),
    make("td", {}, stateText(told)), cell(roundsText(told)),
    cell(told.score ? `${told.score.label} ${told.score.value}` : "", "n"),
    cell(told.epsilon === null ? "" : told.epsilon.toFixed(3), "n"), cell("", "n"),
  ]]));
  const here = chosen();
  runs.forEach((told, i) => {
    const row = $("runs").tBodies[0].rows[i];
    row.classList.toggle("here", told.run === here);
    row.querySelector("a").toggleAttribute("aria-current", told.run === here);
    write(row.lastChild, ago(told.written));
  });
  show($("sites"), !!sites);
  if (sites) showTable($("sites"), sites);
}
function showTable(place, rows) {
  const names = [...new Set(rows.flatMap((row) => Object.keys(row)))];
  place.querySelector("thead tr").replaceChildren(...names.map((name) => make("th", { scope: "col" }, name)));
  fill(place.querySelector("tbody"), rows.map((row, i) => [String(i), row, () => names.map((name) => cell(String(row[name] ?? "")))]));
}
function chosen() {
  const key = location.hash.startsWith("#run=") ? decodeURIComponent(location.hash.slice(5)) : null;
  return key ?? listed?.runs[0]?.run ?? null;
}
function take(told) {
  const fresh = !run || run.run !== told.run || run.epoch !== told.epoch || told.after === 0;
  const columns = fresh ? {} : run.columns;
  for (const [name, values] of Object.entries(told.columns)) {
    columns[name] = (columns[name] || new Array(told.after).fill(null)).slice(0, told.after).concat(values);
  }
  run = { ...told, columns };
}
// --- asking --------------------------------------------------------------------------------------
const tags = new Map();
let waiting = null, asking = false, again = false, last = null;

async function ask(path, kind) { // the answer, or null where it is the one that is known
  const answer = await fetch(path, { cache: "no-cache" });
  if (answer.status === 404) return undefined;
  if (!answer.ok) throw new Error(`status ${answer.status}`);
  const tag = path + answer.headers.get("ETag");
  if (tags.get(kind) === tag) return null;
  const told = await answer.json();
  tags.set(kind, tag);
  return told;
}
async function look() {
  listed = (await ask("api/runs", "runs")) ?? listed;
  const key = chosen();
  if (run && run.run !== key) { run = null; tags.delete("run"); }
  const from = run ? { epoch: run.epoch, after: run.length } : {};
  const told = key === null ? undefined : await ask(`api/run?${new URLSearchParams({ run: key, order: $("order").value, ...from })}`, "run");
  showList();
  if (told) take(told);
  if (told === undefined) { run = null; tags.delete("run"); show($("run"), false); document.title = "fedpeft"; }
  else if (run) told ? showRun() : write($("run-line").childNodes[2] ?? $("run-line"), run.written ? ` · last round ${ago(run.written)}` : "");
}
async function turn() {
  if (asking) { again = true; return; }
  clearTimeout(waiting);
  if (document.hidden) return;
  asking = true;
  try {
    await look();
    last = new Date();
    $("live").className = "on"; write($("live-text"), "live");
  } catch (error) {
    $("live").className = "off"; write($("live-text"), last ? `no answer since ${last.toLocaleTimeString()}` : "no answer");
  }
  asking = false;
  waiting = setTimeout(turn, again ? 0 : PERIOD);
  again = false;
}
document.addEventListener("visibilitychange", turn);
addEventListener("hashchange", async () => { await turn(); $("run-title").focus(); });
$("order").addEventListener("change", turn);
$("table").addEventListener("toggle", () => run && showRounds());
turn();
