// --- a report: what it says is in the page itself --------------------------------------------------
const told = JSON.parse($("data").textContent);
write($("folder"), told.folder ?? "");
write($("made"), `fedpeft ${told.made.version} · ${told.made.date}`);

function fillTable(table, head, rows) { // rows of cells: texts, numbers as texts, or elements
  table.tHead.rows[0].replaceChildren(...head.map(([text, kind]) => make("th", kind ? { scope: "col", class: kind } : { scope: "col" }, text)));
  table.tBodies[0].replaceChildren(...rows.map((cells) => make("tr", {}, ...cells.map((text, i) => cell(text, head[i][1])))));
}
function pairsOf(lines) { return Object.entries(lines).flatMap(([name, value]) => [make("dt", {}, name), make("dd", {}, String(value))]); }
function tableOf(head, rows) {
  const table = make("table", {}, make("thead", {}, make("tr")), make("tbody"));
  if (head.some(Boolean)) fillTable(table, head.map((text, i) => [text, i && "n"]), rows);
  else { table.tHead.remove(); table.tBodies[0].append(...rows.map(([name, ...rest]) => make("tr", {}, make("th", { scope: "row" }, name), ...rest.map((text) => cell(text))))); }
  return make("div", { class: "wide", tabindex: "0", role: "region", "aria-label": "table" }, table);
}
