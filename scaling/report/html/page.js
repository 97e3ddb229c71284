// Redraws the page when its state changes, and changes the state when people use it.

function options(id, name, all) {
  const values = [...new Set(rows.map((row) => row.get(name)))].sort();
  byId(id).replaceChildren(new Option(all, ""), ...values.map((value) => new Option(value, value)));
  byId(id).addEventListener("change", (event) => change({ [id]: event.target.value }));
}

function show({ table = true, plots = true } = {}) {
  for (const id of ["text", "status", "model"])
    if (byId(id).value !== state[id]) byId(id).value = state[id];
  const found = table ? chosen() : [];
  if (table) {
    drawHead();
    document.querySelector("#runs tbody").replaceChildren();
    drawBody(found, PAGE);
  }
  if (plots) drawPlots(found);
  drawDetail();
}

options("status", "status", "all");
options("model", "model", "all");
let waiting = 0; // while somebody types
byId("text").addEventListener("input", (event) => {
  clearTimeout(waiting);
  waiting = setTimeout(() => change({ text: event.target.value }), 150);
});
byId("filters").addEventListener("submit", (event) => event.preventDefault());
byId("clear").addEventListener("click", () => change({ ...START }));
byId("close").addEventListener("click", () => change({ row: "" }));
byId("detail").addEventListener("close", () => {
  if (state.row !== "") change({ row: "" });
});
byId("detail").addEventListener("click", (event) => {
  if (event.target === byId("detail")) change({ row: "" });
});
window.addEventListener("hashchange", () => {
  fromAddress();
  show();
});
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => show());
fromAddress();
show();
