// One row: its figures, config, loss curve and last lines.

let details = null; // read when the first row is opened

function list(id, pairs) {
  byId(id).replaceChildren(
    ...pairs.flatMap(([name, value]) => [
      element("dt", name),
      element("dd", value === null ? "none" : String(value)),
    ]),
  );
}

function drawLoss(row, detail) {
  const { loss = [], validation = [], every = 1 } = detail;
  byId("loss").hidden = loss.length === 0;
  byId("loss-says").textContent =
    loss.length === 0
      ? "There is no record with a loss."
      : `Cross entropy in nats by optimizer step${every > 1 ? `; one step in ${every} is drawn, the record holds all` : ""}.`;
  if (loss.length === 0) return;
  const last = row.get("num_steps");
  const steps = loss.map((value, index) => [last - every * (loss.length - 1 - index), value]);
  const curve = (points, name, more) => ({
    type: "scatter",
    name,
    x: points.map(([step]) => step),
    y: points.map(([, value]) => value),
    ...more,
  });
  draw(
    "loss",
    [
      curve(steps, "training", {
        mode: loss.length > 40 ? "lines" : "lines+markers",
        line: { color: "#4477aa", width: 1.5 },
      }),
      ...(validation.length
        ? [curve(validation, "validation", { mode: "lines+markers", line: { color: "#ee7733" } })]
        : []),
    ],
    axis("optimizer step"),
    axis("nats"),
    true,
  );
}

function drawDetail() {
  const dialog = byId("detail");
  if (state.row === "") return dialog.close();
  details ??= read("details");
  const row = rows[state.row];
  const detail = details.rows[row.index];
  byId("detail-title").textContent =
    `Row ${row.index + 1}: ${row.get("model")}, ${row.get("strategy") ?? "strategy not told"}, ${row.get("status")}`;
  byId("command").textContent = row.get("command");
  byId("log").textContent = detail.log.join("\n") || "no log lines";
  const told = names.filter(
    (name) => row.get(name) !== null && !["model", "rest", "also", "command"].includes(name),
  );
  list(
    "figures",
    told.map((name) => [name, row.get(name)]),
  );
  list(
    "config",
    detail.config === null
      ? [["", "The recipe refused the options: there is none."]]
      : Object.entries({ ...details.shared, ...detail.config }).sort(([one], [other]) =>
          compare(one, other),
        ),
  );
  if (!dialog.open) dialog.showModal();
  dialog.scrollTop = 0;
  return drawLoss(row, detail);
}
