"use strict";
const HEIGHT = 178, LEFT = 46, RIGHT = 10, TOP = 24, BOTTOM = 30, DOTS = 25;
const DASHES = ["", "7 4", "2 4", "9 3 2 3", "4 2", "12 4"];
const SVG = "http://www.w3.org/2000/svg";
const $ = (id) => document.getElementById(id);

// --- building: text is always a text node, so nothing that a run says becomes markup -------------
function make(tag, attributes = {}, ...children) {
  const drawn = ["svg", "path", "line", "text", "circle", "rect", "g"].includes(tag);
  const made = drawn ? document.createElementNS(SVG, tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children);
  return made;
}
const cell = (text, kind) => make("td", kind ? { class: kind } : {}, text);
function write(node, text) { if (node.textContent !== text) node.textContent = text; }
function show(node, visible) { if (node.hidden === visible) node.hidden = !visible; }

function fill(body, rows) { // rows: [key, what it shows, how to make its cells]; what is unchanged stays, with its focus
  const known = new Map([...body.children].map((row) => [row.dataset.key, row]));
  const wanted = rows.map(([key, shown, cells]) => {
    const row = known.get(key) || make("tr");
    const text = JSON.stringify(shown);
    if (row.dataset.shown !== text) {
      const held = row.contains(document.activeElement);
      row.dataset.key = key; row.dataset.shown = text;
      row.replaceChildren(...cells());
      if (held) row.querySelector("a")?.focus();
    }
    return row;
  });
  if (wanted.length !== body.children.length || wanted.some((row, i) => row !== body.children[i])) body.replaceChildren(...wanted);
}

// --- numbers -------------------------------------------------------------------------------------
function short(value) {
  const size = Math.abs(value);
  if (value === 0) return "0";
  if (size >= 1e6 || size < 1e-3) return value.toExponential(2);
  const digits = size >= 100 ? (Number.isInteger(value) ? 0 : 1) : size >= 10 ? 2 : size >= 1 ? 3 : 4;
  return Number.isInteger(value) ? value.toLocaleString("en") : value.toFixed(digits);
}
function tick(value, step) {
  if (value === 0) return "0";
  if (Math.abs(value) >= 1e5 || step < 1e-4) return value.toExponential(1);
  return value.toFixed(Math.max(0, -Math.floor(Math.log10(step) + 1e-9)));
}
function nice(low, high, count) {
  const rough = (high - low) / count, power = 10 ** Math.floor(Math.log10(rough));
  return [1, 2, 5, 10].map((m) => m * power).find((step) => step >= rough - 1e-12 * power);
}
function ago(seconds) {
  if (seconds === null) return "";
  const passed = Math.max(0, Date.now() / 1000 - seconds);
  for (const [unit, size] of [["d", 86400], ["h", 3600], ["min", 60]]) if (passed >= 2 * size) return `${Math.floor(passed / size)} ${unit} ago`;
  return `${Math.floor(passed)} s ago`;
}

// --- charts --------------------------------------------------------------------------------------
class Chart {
  constructor(told) {
    this.kind = JSON.stringify(told);
    this.told = told; this.at = null; this.across = told.across ?? "round"; // what the axis below counts this.data = []; this.rounds = [];
    this.where = make("span"); this.keys = make("ul", { class: "keys" });
    this.plot = make("svg", { class: "plot", tabindex: "0", role: "slider", "aria-label": `${told.title}${told.unit ? `, in ${told.unit}` : ""}, by ${this.across}` });
    this.figure = make("figure", {}, make("figcaption", {}, make("b", {}, told.title), this.where), this.plot, this.keys);
    this.values = told.series.map((series, i) => {
      const value = make("b");
      const line = make("line", { x1: 1, x2: 23, y1: 5, y2: 5, "stroke-width": 2.5, class: `s${i % 6}`, "stroke-dasharray": DASHES[i % 6] });
      this.keys.append(make("li", {}, make("svg", { "aria-hidden": "true" }, line), make("span", {}, series.label), value));
      return value;
    });
    this.plot.addEventListener("pointermove", (event) => this.point(event));
    this.plot.addEventListener("pointerdown", (event) => this.point(event));
    this.plot.addEventListener("pointerleave", () => this.move(null));
    this.plot.addEventListener("blur", () => this.move(null));
    this.plot.addEventListener("keydown", (event) => this.key(event));
    new ResizeObserver(() => this.draw()).observe(this.plot);
  }
  update(columns) {
    const { scale, series } = this.told;
    const scaled = (column) => (columns[column] || []).map((value) => (value === null ? null : value * scale));
    this.rounds = columns[this.told.key ?? "round"].map((round) => round + 1);
    this.data = series.map(({ column }) => scaled(column));
    this.bands = series.map(({ low, high }) => (low ? [scaled(low), scaled(high)] : null));
    this.some = this.rounds.map((_, i) => i).filter((i) => this.data.some((values) => values[i] !== null && values[i] !== undefined));
    this.draw();
  }
  key(event) {
    const last = this.some.length - 1, now = this.at === null ? last : this.some.indexOf(this.at);
    const to = { ArrowLeft: now - 1, ArrowDown: now - 1, ArrowRight: now + 1, ArrowUp: now + 1, PageUp: now + 10, PageDown: now - 10, Home: 0, End: last }[event.key];
    if (event.key === "Escape") return this.move(null);
    if (to === undefined) return;
    event.preventDefault();
    this.move(this.some[Math.min(last, Math.max(0, to))]);
  }
  point(event) {
    const x = event.clientX - this.plot.getBoundingClientRect().left;
    const near = (i) => Math.abs(this.x(this.rounds[i]) - x);
    this.move(this.some.reduce((best, i) => (best === null || near(i) < near(best) ? i : best), null));
  }
  move(at) { if (at !== this.at) { this.at = at ?? null; this.draw(); } }
  draw() {
    this.width = this.plot.clientWidth;
    if (!this.width || !this.some) return;
    this.axes(); this.lines(); this.tell();
  }
  axes() {
    const all = [this.data, this.bands.filter(Boolean)].flat(3).filter((value) => (value ?? null) !== null);
    let low = Infinity, high = -Infinity;
    for (const value of all) { low = Math.min(low, value); high = Math.max(high, value); }
    if (!all.length) [low, high] = [0, 1];
    if (this.told.zero) low = Math.min(0, low);
    if (high === low) [low, high] = low === 0 ? [0, 1] : [low - Math.abs(low) / 10, high + Math.abs(high) / 10];
    const step = nice(low, high, 4);
    low = Math.floor(low / step + 1e-9) * step; high = Math.ceil(high / step - 1e-9) * step;
    const first = this.rounds[this.some[0]] ?? 1, last = Math.max(first + 1, this.rounds[this.some.at(-1)] ?? 1);
    this.x = (round) => LEFT + ((round - first) / (last - first)) * (this.width - LEFT - RIGHT);
    this.y = (value) => TOP + (1 - (value - low) / (high - low)) * (HEIGHT - TOP - BOTTOM);
    this.plot.setAttribute("viewBox", `0 0 ${this.width} ${HEIGHT}`);
    const parts = [make("text", { x: 0, y: 10 }, this.told.unit), make("text", { x: this.width - RIGHT, y: HEIGHT - 2, "text-anchor": "end" }, this.across)];
    for (let i = 0; low + i * step <= high + step / 2; i++) {
      const value = Math.abs(low + i * step) < step / 1e6 ? 0 : low + i * step, y = this.y(value);
      parts.push(make("line", { class: "grid", x1: LEFT, x2: this.width - RIGHT, y1: y, y2: y }), make("text", { x: LEFT - 7, y: y + 4, "text-anchor": "end" }, tick(value, step)));
    }
    const across = Math.max(1, Math.round(nice(first, last, Math.max(2, Math.floor(this.width / 75)))));
    const marks = [first];
    for (let round = Math.ceil((first + 1) / across) * across; round <= last; round += across) marks.push(round);
    if (marks.length > 1 && this.x(marks[1]) - this.x(first) < 26) marks.splice(1, 1);
    for (const round of marks) parts.push(make("text", { x: this.x(round), y: HEIGHT - BOTTOM + 15, "text-anchor": "middle" }, String(round)));
    parts.push(make("line", { class: "axis", x1: LEFT, x2: this.width - RIGHT, y1: HEIGHT - BOTTOM, y2: HEIGHT - BOTTOM }));
    this.plot.replaceChildren(...parts);
  }
  lines() {
    if (this.at !== null) { const x = this.x(this.rounds[this.at]); this.plot.append(make("line", { class: "cursor", x1: x, x2: x, y1: TOP, y2: HEIGHT - BOTTOM })); }
    this.bands.forEach((band, i) => band && this.band(band, i));
    this.data.forEach((values, i) => {
      const points = thinned(this.some.filter((at) => (values[at] ?? null) !== null), values, this.width);
      const place = (at) => [this.x(this.rounds[at]), this.y(values[at])];
      const d = points.map((at, n) => `${n ? "L" : "M"}${place(at).map((v) => v.toFixed(1)).join(" ")}`).join("");
      if (points.length > 1) this.plot.append(make("path", { class: `s${i % 6}`, d, "stroke-dasharray": DASHES[i % 6] }));
      const dots = points.length <= DOTS ? points : [];
      for (const at of this.at === null ? dots : [...dots, this.at]) {
        if ((values[at] ?? null) === null) continue;
        const [x, y] = place(at);
        this.plot.append(make("circle", { class: `f${i % 6}`, cx: x, cy: y, r: at === this.at ? 4.5 : 2.6 }));
      }
    });
  }
  band([low, high], i) {
    const there = this.some.filter((at) => (low[at] ?? null) !== null && (high[at] ?? null) !== null);
    const edge = (values) => (at) => `${this.x(this.rounds[at]).toFixed(1)} ${this.y(values[at]).toFixed(1)}`;
    if (there.length > 1) this.plot.append(make("path", { class: `band t${i % 6}`, d: `M${[...there.map(edge(low)), ...there.toReversed().map(edge(high))].join("L")}Z` }));
  }
  tell() {
    const texts = this.data.map((values, i) => {
      const at = this.at ?? this.some.findLast((each) => (values[each] ?? null) !== null);
      const text = (values[at] ?? null) === null ? "" : this.told.unit === "%" ? `${values[at].toFixed(2)} %` : short(values[at]);
      write(this.values[i], text);
      return text && `${this.told.series[i].label} ${text}`;
    });
    const at = this.at ?? this.some.at(-1), round = this.rounds[at] ?? 0;
    write(this.where, this.at !== null ? `${this.across} ${round}` : this.across === "round" ? "newest" : "");
    const told = { valuemin: this.rounds[this.some[0]] ?? 0, valuemax: this.rounds[this.some.at(-1)] ?? 0, valuenow: round, valuetext: `${this.across} ${round}: ${texts.filter(Boolean).join(", ")}` };
    for (const [name, value] of Object.entries(told)) this.plot.setAttribute(`aria-${name}`, value);
  }
}
function thinned(points, values, width) { // per pixel the lowest and the highest: peaks stay
  if (points.length <= 2 * width) return points;
  const size = points.length / width, kept = new Set([points[0], points.at(-1)]);
  for (let i = 0; i < width; i++) {
    const some = points.slice(Math.floor(i * size), Math.floor((i + 1) * size));
    if (!some.length) continue;
    kept.add(some.reduce((a, b) => (values[b] < values[a] ? b : a)));
    kept.add(some.reduce((a, b) => (values[b] > values[a] ? b : a)));
  }
  return [...kept].sort((a, b) => a - b);
}
