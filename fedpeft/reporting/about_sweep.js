// --- a sweep that is reported ----------------------------------------------------------------------
const SHAPES = [
  (r) => `M${-r} 0A${r} ${r} 0 1 0 ${r} 0A${r} ${r} 0 1 0 ${-r} 0Z`,
  (r) => `M${-r * 0.9} ${-r * 0.9}H${r * 0.9}V${r * 0.9}H${-r * 0.9}Z`,
  (r) => `M0 ${-r * 1.2}L${r * 1.1} ${r * 0.8}H${-r * 1.1}Z`,
  (r) => `M0 ${-r * 1.3}L${r * 1.3} 0L0 ${r * 1.3}L${-r * 1.3} 0Z`,
  (r) => `M0 ${r * 1.2}L${r * 1.1} ${-r * 0.8}H${-r * 1.1}Z`,
  (r) => `M${-r} ${-r * 0.35}H${-r * 0.35}V${-r}H${r * 0.35}V${-r * 0.35}H${r}V${r * 0.35}H${r * 0.35}V${r}H${-r * 0.35}V${r * 0.35}H${-r}Z`,
];
const points = told.points.map((point, at) => ({ ...point, at, text: point.values.join(" ").toLowerCase() }));
const NONE = told.axes.length, MOST_COLOURS = 6;
const usual = told.axes.findIndex((_, i) => [2, 3, 4, 5, MOST_COLOURS].includes(values(i).length));
const state = { metric: told.metrics[0], colour: usual < 0 ? NONE : usual, sort: null, down: true, here: null, shown: points };
const front = () => told.fronts[state.metric.name];
const scoreOf = (point) => point.scores[state.metric.name];

function figure(value, metric = state.metric) { // a score, or a difference of scores, as it is read
  return value === null ? "" : metric.unit === "%" ? (value * metric.scale).toFixed(2) : short(value);
}
function signed(value) { return (value > 0 ? "+" : "") + figure(value); }
function probability(p) { return p < 0.001 ? "< 0.001" : p.toFixed(3); }
function values(at) { // of an axis, in the order of the sweep; numbers in theirs
  const found = [...new Set(points.map((point) => point.values[at]))];
  return found.every((value) => value !== "" && Number.isFinite(Number(value))) ? found.sort((a, b) => a - b) : found;
}

// --- charts ----------------------------------------------------------------------------------------
class Scatter {
  constructor(title, unit, x) {
    this.x = x; this.unit = unit;
    this.tip = make("span", { class: "tip" });
    this.plot = make("svg", { class: "plot scatter", role: "img", "aria-label": `${title}; the table below has the same numbers` });
    this.figure = make("figure", {}, make("figcaption", {}, make("b", {}, title)), this.plot, this.tip);
    this.plot.addEventListener("pointermove", (event) => this.point(event, false));
    this.plot.addEventListener("click", (event) => this.point(event, true));
    this.plot.addEventListener("pointerleave", () => this.tell(null));
    new ResizeObserver(() => this.width !== this.plot.clientWidth && this.draw()).observe(this.plot);
  }
  point(event, pick) {
    const box = this.plot.getBoundingClientRect(), [x, y] = [event.clientX - box.left, event.clientY - box.top];
    let best = null, least = 32 ** 2;
    for (const mark of this.marks) {
      const away = (mark.x - x) ** 2 + (mark.y - y) ** 2;
      if (away < least) [best, least] = [mark, away];
    }
    this.tell(best?.point ?? null);
    if (pick && best) choose(best.point.at, false);
  }
  tell(point) { write(this.tip, point ? pointText(point) : this.hint); }
  draw() {
    this.width = this.plot.clientWidth;
    this.height = this.plot.clientHeight;
    if (!this.width) return;
    const shown = state.shown.filter((point) => scoreOf(point) && this.x(point) !== null);
    const finite = shown.map(this.x).filter(Number.isFinite);
    this.apart = shown.some((point) => this.x(point) === Infinity);
    this.hint = shown.length ? "Point at a mark to read it, click to see its plan." : "No point to show.";
    this.tell(null);
    const scaled = shown.flatMap((point) => scoreOf(point).filter((v) => v !== null).map((v) => v * state.metric.scale));
    this.axes(finite, scaled);
    this.marks = shown.map((point) => ({ point, colour: tint(point), value: this.x(point) }));
    const several = palette.length;
    for (const mark of this.marks) {
      mark.x = this.across(mark.value) + (several > 1 && this.dodges ? (mark.colour % 6 - Math.min(5, several - 1) / 2) * 3.2 : 0);
      mark.y = this.up(scoreOf(mark.point)[0] * state.metric.scale);
    }
    if (!this.loose) palette.forEach((_, colour) => this.frontier(colour));
    const layers = [false, true].flatMap((best) => this.marks.filter((mark) => members.has(mark.point.at) === best));
    this.plot.append(...layers.map((mark) => this.mark(mark, members.has(mark.point.at))));
    this.ring();
  }
  axes(finite, scaled) {
    const left = 50, right = this.apart ? 62 : 14, top = 26, bottom = 44;
    let low = Math.min(...scaled), high = Math.max(...scaled);
    if (!scaled.length) [low, high] = [0, 1];
    if (high === low) [low, high] = [low - 1, high + 1];
    const step = nice(low, high, 5);
    low = Math.floor(low / step + 1e-9) * step; high = Math.ceil(high / step - 1e-9) * step;
    let first = Math.min(...finite), last = Math.max(...finite);
    if (!finite.length) [first, last] = [1, 10];
    [first, last] = first === last ? [first / 2, last * 2] : [first / 1.15, last * 1.15];
    const log = Math.log, end = this.width - right;
    this.across = (x) => (x === Infinity ? end + 34 : left + (log(x / first) / log(last / first)) * (end - left));
    this.up = (y) => top + (1 - (y - low) / (high - low)) * (this.height - top - bottom);
    const { metric } = state, base = this.height - bottom;
    const parts = [make("text", { class: "title", x: 0, y: 12 }, `${metric.label}${metric.unit ? ` (${metric.unit})` : ""}`),
      make("text", { class: "title", x: (left + end) / 2, y: this.height - 6, "text-anchor": "middle" }, this.unit)];
    for (let i = 0; low + i * step <= high + step / 2; i++) {
      const value = low + i * step, y = this.up(value);
      parts.push(make("line", { class: "grid", x1: left, x2: this.width - 8, y1: y, y2: y }), make("text", { x: left - 7, y: y + 4, "text-anchor": "end" }, tick(Math.abs(value) < step / 1e6 ? 0 : value, step)));
    }
    let before = -Infinity;
    for (const value of logTicks(first, last)) {
      const x = this.across(value);
      parts.push(make("line", { class: "axis", x1: x, x2: x, y1: base, y2: base + 4 }));
      if (x - before > 34) { parts.push(make("text", { x, y: base + 17, "text-anchor": "middle" }, String(Number(value.toPrecision(6))))); before = x; }
    }
    if (this.apart) parts.push(make("line", { class: "apart", x1: end + 6, x2: end + 6, y1: top, y2: base }), make("text", { x: end + 34, y: base + 17, "text-anchor": "middle" }, "none"));
    parts.push(make("line", { class: "axis", x1: left, x2: this.width - 8, y1: base, y2: base }));
    this.plot.setAttribute("viewBox", `0 0 ${this.width} ${this.height}`);
    this.plot.replaceChildren(...parts);
  }
  frontier(colour) { // of the points of one colour those that none of them beats in both directions
    const sign = state.metric.higher ? 1 : -1, own = this.marks.filter((mark) => mark.colour === colour).sort((a, b) => a.value - b.value || sign * (scoreOf(b.point)[0] - scoreOf(a.point)[0]));
    const kept = [];
    let best = -Infinity;
    for (const mark of own) if (sign * scoreOf(mark.point)[0] > best) { kept.push(mark); best = sign * scoreOf(mark.point)[0]; }
    if (kept.length < 2) return;
    const place = (mark, which) => `${mark.x.toFixed(1)} ${this.up(scoreOf(mark.point)[which] * state.metric.scale).toFixed(1)}`;
    const banded = kept.filter((mark) => scoreOf(mark.point)[1] !== null);
    if (banded.length > 1) this.plot.append(make("path", { class: `band t${colour % 6}`, d: `M${[...banded.map((m) => place(m, 1)), ...banded.toReversed().map((m) => place(m, 2))].join("L")}Z` }));
    this.plot.append(make("path", { class: `s${colour % 6}`, "stroke-dasharray": DASHES[colour % 6], d: `M${kept.map((m) => place(m, 0)).join("L")}` }));
    for (const mark of banded) this.plot.append(make("line", { class: `bar s${colour % 6}`, x1: mark.x, x2: mark.x, y1: this.up(scoreOf(mark.point)[1] * state.metric.scale), y2: this.up(scoreOf(mark.point)[2] * state.metric.scale) }));
    for (const mark of kept) mark.kept = true;
  }
  mark({ point, x, y, colour, kept = this.loose }, best) {
    const tone = colour % 6;
    return make("path", { class: `dot s${tone} t${tone}${best ? " front" : kept ? "" : " faint"}`, d: outline(tone, best), transform: `translate(${x.toFixed(1)} ${y.toFixed(1)})`, "data-at": point.at });
  }
  ring() { // around the point that is chosen
    const mark = this.marks?.find(({ point }) => point.at === state.here);
    this.plot.querySelector(".here")?.remove();
    if (mark) this.plot.append(make("circle", { class: "here", r: 11, cx: mark.x, cy: mark.y }));
  }
}
const outlines = new Map();
function outline(tone, best) {
  const key = `${tone} ${best}`;
  if (!outlines.has(key)) outlines.set(key, SHAPES[tone](best ? 5 : 3.6));
  return outlines.get(key);
}
function logTicks(first, last) {
  const found = [], step = nice(first, last, 5);
  if (last / first < 6) { // a part of the logarithmic axis that is nearly linear
    for (let value = Math.ceil(first / step) * step; value <= last; value += step) found.push(Number(value.toPrecision(12)));
    return found;
  }
  for (let power = Math.floor(Math.log10(first)); power <= Math.ceil(Math.log10(last)); power++)
    for (const m of [1, 2, 5]) if (m * 10 ** power >= first * 0.999 && m * 10 ** power <= last * 1.001) found.push(m * 10 ** power);
  return found.length ? found : [first, last];
}
let palette = [], tints = new Map(); // the values that have colours, and the number of each
function mix() {
  palette = state.colour < NONE ? values(state.colour) : [undefined];
  tints = new Map(palette.map((value, i) => [value, i]));
}
function tint(point) { return tints.get(point.values[state.colour]); }
function pointText(point) {
  const [mean, low, high] = scoreOf(point), { unit } = state.metric;
  const parts = [told.axes.map((axis, i) => `${axis} ${point.values[i]}`).join(", ")];
  parts.push(`${figure(mean)}${unit && ` ${unit}`}${low === null ? "" : ` (${figure(low)} to ${figure(high)})`}`);
  told.protected.forEach((whom, i) => parts.push(point.epsilon[i] === null ? `no ${whom}` : `${whom} ${short(point.epsilon[i])}`));
  if (point.mb !== null) parts.push(`${short(point.mb)} MB`);
  return parts.join(" · ");
}
const scatters = told.protected.map((whom, i) => Object.assign(new Scatter(`Score against ${whom}`, `${whom} at the end of a run`, (point) => (point.epsilon[i] === null ? Infinity : point.epsilon[i])), { dodges: true }));
if (points.some((point) => point.mb)) scatters.push(new Scatter("Score against megabytes", "MB up and down, a run", (point) => point.mb || null));
if (points.some((point) => point.up)) scatters.push(new Scatter("Score against megabytes up", "MB up, a run", (point) => point.up || null));
told.axes.forEach((axis, i) => { // an axis of numbers: what a search has tried, or a grid of rates, ranks or rounds
  const numbers = values(i).map(Number);
  if (numbers.length < 4 || numbers.some((number) => !(number > 0))) return;
  scatters.push(Object.assign(new Scatter(`Score against ${axis}`, axis, (point) => Number(point.values[i])), { loose: true }));
});
$("charts").append(...scatters.map((scatter) => scatter.figure));

// --- the table of points ---------------------------------------------------------------------------
const COLUMNS = [
  { name: "front", kind: "", key: (point) => (members.has(point.at) ? 1 : 0), first: true },
  { name: "score", kind: "n", key: (point) => scoreOf(point)?.[0] ?? null, first: true },
  ...told.axes.map((axis, i) => ({ name: axis, kind: "", key: (point) => { const number = Number(point.values[i]); return point.values[i] !== "" && Number.isFinite(number) ? number : point.values[i]; } })),
  { name: "seeds", kind: "n", key: (point) => point.seeds.filter(([, status]) => status === "finished").length },
  ...told.protected.map((whom, i) => ({ name: whom, kind: "n", key: (point) => point.epsilon[i] })),
  { name: "MB", kind: "n", key: (point) => point.mb },
  { name: "seconds", kind: "n", key: (point) => point.seconds },
];
function head() {
  $("points").tHead.rows[0].replaceChildren(...COLUMNS.map((column) => {
    const button = make("button", { type: "button" }, column.name === "score" ? state.metric.label + (state.metric.unit && ` (${state.metric.unit})`) : column.name === "front" ? "★" : column.name);
    if (column.name === "front") button.setAttribute("aria-label", "on the Pareto front");
    button.addEventListener("click", () => { state.down = state.sort === column ? !state.down : !!column.first && (column.name !== "score" || state.metric.higher); state.sort = column; sort(); });
    return make("th", column.kind ? { scope: "col", class: column.kind } : { scope: "col" }, button);
  }));
}
const FEW = 100; // rows that are shown at once: a table of thousands takes a browser long to lay out
let rows = [], members = new Set();
function rowOf(point) { // made when it is first shown, and anew where another score is looked at
  return rows[point.at] ??= build(point);
}
function build(point) {
  const found = scoreOf(point), done = point.seeds.filter(([, status]) => status === "finished").length;
  const pick = make("button", { type: "button", class: members.has(point.at) ? "pick star" : "pick", "aria-label": `show point ${point.at + 1}${members.has(point.at) ? ", on the front" : ""}` }, members.has(point.at) ? "★" : "○");
  const half = found && found[1] !== null ? make("span", { class: "spread" }, ` ±${figure((found[2] - found[1]) / 2)}`) : "";
  const named = (value, i) => {
    const made = cell(value, value.length < 25 ? "one" : "");
    if (i === state.colour) made.prepend(make("span", { class: `chip t${tint(point) % 6}` }));
    return made;
  };
  const row = make("tr", {}, make("td", {}, pick), make("td", { class: "n" }, found ? figure(found[0]) : "", half), ...point.values.map(named), cell(done === point.seeds.length ? String(done) : `${done} of ${point.seeds.length}`, "n"),
    ...point.epsilon.map((value) => cell(value === null ? "none" : short(value), "n")), cell(point.mb === null ? "not told" : short(point.mb), "n"), cell(point.seconds === null ? "" : short(point.seconds), "n"));
  row.addEventListener("click", () => choose(point.at, true));
  row.classList.toggle("here", point.at === state.here);
  return row;
}
const more = make("button", { type: "button", class: "more" });
more.addEventListener("click", () => { state.all = true; sort(); });
function sort() {
  const { sort: column, down } = state;
  const keys = new Map(state.shown.map((point) => [point, column.key(point)]));
  const order = (a, b) => {
    const [x, y] = [keys.get(a), keys.get(b)];
    if (x === null || y === null) return (x === null) - (y === null) || a.at - b.at;
    const less = typeof x === "number" && typeof y === "number" ? x - y : String(x).localeCompare(String(y), "en", { numeric: true });
    return (down ? -less : less) || a.at - b.at;
  };
  const first = [...state.shown].sort(order).slice(0, state.all ? Infinity : FEW), hidden = state.shown.length - first.length;
  $("points").tBodies[0].replaceChildren(...first.map(rowOf));
  $("points-note").replaceChildren(...(hidden ? [`The first ${first.length}; `, more] : []));
  write(more, `show ${hidden} more`);
  COLUMNS.forEach((each, i) => { const th = $("points").tHead.rows[0].cells[i]; if (each === column) th.setAttribute("aria-sort", down ? "descending" : "ascending"); else th.removeAttribute("aria-sort"); });
}
function filter() {
  const words = $("search").value.toLowerCase().split(/\s+/).filter(Boolean), wanted = filters.map((box) => box.value);
  state.shown = points.filter((point) => words.every((word) => point.text.includes(word)) && wanted.every((value, i) => value === "" || point.values[i] === value.slice(1)));
  write($("points-count"), `${state.shown.length} of ${points.length}`);
  sort();
  for (const scatter of scatters) scatter.draw();
}
const filters = told.axes.map((axis, i) => {
  const box = make("select", {}, make("option", { value: "" }, "all"), ...values(i).map((value) => make("option", { value: `=${value}` }, value || "(nothing)")));
  box.addEventListener("change", filter);
  $("filters").append(make("label", {}, axis, box));
  return box;
});

// --- one point -------------------------------------------------------------------------------------
const WORDS = new Set(["yes", "no", "on", "off", "true", "false", "null", "y", "n"]);
function yaml(value) { return /^[A-Za-z0-9][A-Za-z0-9_./-]*$/.test(value) && !WORDS.has(value.toLowerCase()) ? value : JSON.stringify(value); }
function planOf(point, seed) { return { ...told.base, ...point.lines, seed }; }
function planText(point, seed) { return Object.entries(planOf(point, seed)).filter(([, value]) => value !== "").map(([name, value]) => `${name}: ${yaml(value)}`).join("\n"); }
let curve = null;
function choose(at, move) {
  const before = state.here, point = points[at];
  state.here = at;
  rows[before]?.classList.remove("here"); rows[at]?.classList.add("here");
  for (const scatter of scatters) scatter.ring();
  showPoint(point);
  if (move) $("point-title").focus();
}
function showPoint(point) {
  const { metric } = state;
  show($("point"), true);
  write($("point-title"), told.axes.map((axis, i) => `${axis} ${point.values[i] || "(nothing)"}`).join(" · ") || "the only point");
  const run = point.seeds.find(([, , name]) => name), path = point.curves[metric.name] ?? [];
  $("point-curve").replaceChildren();
  if (path[0]?.length > 1) {
    const chart = new Chart({ title: `${metric.label}, mean over seeds`, unit: metric.unit, scale: metric.scale, zero: false, series: [{ column: "mean", label: "mean and 95 % band", low: "low", high: "high" }] });
    const band = (sign) => path[0].map((_, i) => (path[2][i] === null ? null : path[1][i] + sign * path[2][i]));
    $("point-curve").append(chart.figure);
    chart.update({ round: path[0].map((round) => round - 1), mean: path[1], low: band(-1), high: band(1) });
  }
  const which = told.metrics.indexOf(metric);
  fillTable($("point-runs"), [["seed"], ["run"], ["", ""], [metric.label, "n"]], point.seeds.map(([seed, status, name, own]) => [seed, name, status, figure(own[which] ?? null)]));
  write($("point-plan"), Object.keys(point.lines).length || run ? planText(point, run?.[0] ?? "") : "refused before it had a plan");
  write($("point-command"), run && told.command.words ? point.seeds.filter(([, , name]) => name).map(([, , name]) => told.command.words.map((word) => quoted(word.replace("RUN", name))).join(" ")).join("\n") : "nothing was run");
  showPairs(point);
}
function quoted(word) { return /^[\w@%+=:,./-]+$/.test(word) ? word : `'${word.replaceAll("'", "'\"'\"'")}'`; }
function showPairs(point) {
  const own = (told.pairs[state.metric.name] ?? []).filter(([, at]) => at.includes(point.at));
  const found = own.map(([axis, [a, b], seeds, mean, low, high, p, corrected]) => {
    const turned = b === point.at, sign = turned ? -1 : 1, other = points[turned ? a : b];
    const ends = [sign * low, sign * high].sort((x, y) => x - y);
    return [`${told.axes[axis]} ${other.values[axis] || "(nothing)"}`, difference(sign * mean, ...ends, corrected), String(seeds), probability(p), probability(corrected)];
  });
  fillTable($("point-pairs"), [["all else equal, against"], ["difference, 95 % interval", "n"], ["seeds", "n"], ["p", "n"], ["p (Holm)", "n"]], found);
  write($("point-note"), found.length ? `p of a paired t-test over seeds; Holm's correction is for all ${told.pairs[state.metric.name].length} pairs of neighbours of this score.` : "No comparison: it takes a neighbour with two seeds or more in common" + (state.metric.name in told.pairs ? "." : "; of this score all are in tables/pairs.csv."));
}
function difference(mean, low, high, corrected) {
  const unit = state.metric.unit === "%" ? " points" : "";
  return make("span", corrected < 0.05 ? { class: "sure" } : {}, `${signed(mean)}${unit}`, make("span", { class: "spread" }, ` [${signed(low)}, ${signed(high)}]`));
}

// --- the rest --------------------------------------------------------------------------------------
function showEffects() {
  const found = told.effects[state.metric.name] ?? [];
  show($("effects"), found.length > 0);
  fillTable($("effects").querySelector("table"), [["axis"], ["value"], ["against"], ["difference, 95 % interval", "n"], ["seeds", "n"], ["settings", "n"], ["p", "n"], ["p (Holm)", "n"]],
    found.map(([axis, settings, one, other, seeds, mean, low, high, p, corrected]) => [told.axes[axis], one || "(nothing)", other || "(nothing)", difference(mean, low, high, corrected), String(seeds), String(settings), probability(p), probability(corrected)]));
  write($("effects-note"), `Of ${state.metric.label}; ${state.metric.higher ? "higher" : "lower"} is better. For each seed the mean difference over all settings of the other axes that both values have, then a paired t-test over seeds. Holm's correction is for all ${found.length} rows; bold: below 0.05 after it.`);
}
function showTiles() {
  const { metric } = state, scored = points.filter(scoreOf), sign = metric.higher ? 1 : -1;
  const best = (some) => some.reduce((a, b) => (a === null || sign * scoreOf(b)[0] > sign * scoreOf(a)[0] ? b : a), null);
  const text = (point) => `${figure(scoreOf(point)[0])}${metric.unit && ` ${metric.unit}`}`, where = (point) => point.values.join(", ");
  const { counts } = told, tiles = [["runs finished", String(counts.finished), `of ${counts.runs}, ${counts.points} points`]];
  const top = best(scored), hidden = best(scored.filter((point) => point.epsilon.some((value) => value !== null)));
  if (top) tiles.push([`best ${metric.label}`, text(top), where(top)]);
  if (hidden && hidden !== top) tiles.push(["best with a promise", text(hidden), where(hidden)]);
  tiles.push(["on the Pareto front", String(front()?.members.length ?? 0), `by ${front()?.objectives.map((o) => told.metrics.find((m) => m.name === o)?.label ?? o).join("; ")}`]);
  if (counts.failed) tiles.push(["failed or refused", String(counts.failed), "reasons are below"]);
  if (counts.unfinished) tiles.push(["not finished", String(counts.unfinished), "the next fedpeft sweep goes on"]);
  $("tiles").replaceChildren(...tiles.map(([label, value, of]) => make("div", {}, make("dt", {}, label), make("dd", {}, value), make("dd", { class: "of" }, of))));
}
function showLegend() {
  const some = new Set(points.filter(scoreOf).map((point) => point.values[state.colour]));
  const keys = palette.map((value, i) => {
    if (!some.has(value)) return [];
    const icon = make("svg", { width: 34, height: 14, viewBox: "0 -7 34 14", "aria-hidden": "true", class: `t${i % 6}` }, make("line", { x1: 1, x2: 33, y1: 0, y2: 0, "stroke-width": 2, class: `s${i % 6}`, "stroke-dasharray": DASHES[i % 6] }),
      make("g", { transform: "translate(17 0)" }, make("path", { d: SHAPES[i % 6](4.4), class: `s${i % 6} f${i % 6}` })));
    return [make("span", { class: "key" }, icon, value === undefined ? "all points" : value || "(nothing)")];
  });
  $("legend").replaceChildren(...keys.flat());
}
function redraw() {
  rows = []; members = new Set(front().members); mix();
  head(); showTiles(); showLegend(); filter(); showEffects();
  if (state.here !== null) showPoint(points[state.here]);
}
write($("sweep-title"), told.name);
write($("sweep-line"), told.notes.join("; "));
$("metric").append(...told.metrics.map((metric, i) => make("option", { value: i }, metric.label)));
$("colour").append(...[...told.axes, "nothing"].map((axis, i) => make("option", { value: i }, axis)));
$("colour").value = state.colour;
show($("colour").parentNode, told.axes.length > 1);
$("metric").addEventListener("change", () => { state.metric = told.metrics[$("metric").value]; state.down = state.metric.higher; state.sort = COLUMNS.find((column) => column.name === "score"); redraw(); });
$("colour").addEventListener("change", () => { state.colour = Number($("colour").value); redraw(); });
$("search").addEventListener("input", filter);
for (const form of [$("controls"), $("filters")]) form.addEventListener("submit", (event) => event.preventDefault());
fillTable($("problems").querySelector("table"), [["reason"], ["runs", "n"], ["where"]], told.problems.map(({ reason, runs, where }) => [reason, String(runs), make("ul", {}, ...where.map((text) => make("li", {}, text)))]));
show($("problems"), told.problems.length > 0);
$("common").querySelector("dl").append(...pairsOf(told.base));
$("made-with").querySelector("dl").append(...pairsOf(told.command.made_with ?? {}));
$("reading").append(...told.reading.map((text) => make("li", {}, text)));
state.sort = COLUMNS.find((column) => column.name === "score"); state.down = state.metric.higher;
redraw();
document.body.dataset.ready = "yes";
