// --- one run that is reported ----------------------------------------------------------------------
const ORDERS = {
  name: (a, b) => (a.name < b.name ? -1 : 1),
  refused: (a, b) => b.refused - a.refused || ORDERS.name(a, b),
  used: (a, b) => a.used - b.used || ORDERS.name(a, b),
};
function sortClients() {
  run.clients.rows.sort(ORDERS[$("order").value]);
  showClients();
}
run = { ...told, written: null };
for (const { id, title, tables } of told.sections.filter((section) => section.tables.length)) {
  const made = make("section", { id }, make("h3", {}, title), ...tables.map(({ head, rows }) => tableOf(head, rows)));
  if (id === "versions") $("plan").after(made); else $("clients").before(made);
}
write($("command").querySelector("pre"), told.command);
write($("command-note"), told.again);
$("missing").querySelector("ul").append(...told.missing.map((text) => make("li", {}, text)));
show($("missing"), told.missing.length > 0);
$("plan").open = true;
$("order").addEventListener("change", sortClients);
$("table").addEventListener("toggle", showRounds);
showRun();
document.body.dataset.ready = "yes";
