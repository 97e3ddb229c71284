// Draws the table: heads sort it, rows open. Strings of records are put in as text.

function element(kind, text = "", attributes = {}) {
  const made = document.createElement(kind);
  made.textContent = text;
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  return made;
}

function nextOrder(name) {
  if (state.sort !== name) return { sort: name, down: NUMBERS.has(name) ? "1" : "" };
  return { sort: name, down: state.down ? "" : "1" };
}

function drawHead() {
  const cells = COLUMNS.map(([name, title]) => {
    const head = element("th", "", { scope: "col" });
    if (NUMBERS.has(name)) head.className = "number";
    const order = state.sort === name ? (state.down ? "descending" : "ascending") : "";
    if (order) head.setAttribute("aria-sort", order);
    const arrow = { ascending: " ▲", descending: " ▼" }[order] ?? "";
    const button = element("button", title + arrow, {
      type: "button",
      "data-sort": name,
      title: `sort by ${name}`,
    });
    button.addEventListener("click", () => {
      change(nextOrder(name));
      document.querySelector(`[data-sort="${name}"]`).focus();
    });
    head.append(button);
    return head;
  });
  const first = element("th", "", { scope: "col" });
  first.append(element("span", "row"));
  document.querySelector("#runs thead tr").replaceChildren(first, ...cells);
}

const SPEEDS = ["units_per_s", "low_units_per_s", "high_units_per_s", "units_per_s_per_device"];
const isProven = (row) => /^(equal|reference)/.test(row.get("parity") ?? "");

function drawRow(row) {
  const line = element("tr", "", { id: `row-${row.index}` });
  const first = element("td");
  first.append(
    element("button", String(row.index + 1), {
      type: "button",
      "aria-label": `open row ${row.index + 1}`,
    }),
  );
  line.append(first);
  for (const [name, , format] of COLUMNS) {
    const value = row.get(name);
    const text = value === null ? "" : format(value, row);
    const cell = element("td", text);
    if (text && SPEEDS.includes(name) && !isProven(row)) cell.replaceChildren(element("s", text));
    if (NUMBERS.has(name)) cell.className = "number";
    else if (name === "status" && value !== "ok") cell.className = "bad";
    else if (cell.textContent.length > 30)
      Object.assign(cell, { className: "long", title: value });
    line.append(cell);
  }
  line.addEventListener("click", () => change({ row: String(row.index) }));
  return line;
}

function drawBody(found, upTo) {
  const body = document.querySelector("#runs tbody");
  body.append(...found.slice(body.children.length, upTo).map(drawRow));
  const left = found.length - body.children.length;
  byId("shown").textContent =
    `${whole(found.length)} of ${whole(rows.length)} rows` +
    (left > 0 ? `; the first ${whole(body.children.length)} of them are in the table` : "");
  byId("more").hidden = left <= 0;
  byId("more").textContent = `Show ${whole(Math.min(PAGE, left))} more`;
  byId("more").onclick = () => drawBody(found, body.children.length + PAGE);
}
