// Shows one row: its figures, config, loss curve and last log lines.

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
      : `Cross entropy by optimizer step${every > 1 ? `; one step in ${every} is drawn, the record holds all` : ""}.`;
  if (loss.length === 0) return;
  const last = row.get("num_steps");
  const steps = loss.map((value, index) => [last - every * (loss.length - 1 - index), value]);
  const curves = [
    { label: "training", color: "#1490d8", points: steps, hasMarks: loss.length <= 40 },
    { label: "validation", color: "#c0622b", points: validation, hasMarks: true },
  ].filter(({ points }) => points.length);
  const values = curves.flatMap(({ points }) => points.map(([, value]) => value));
  const ends = curves.map(({ label, color, points }) => {
    const [x, y] = points.at(-1);
    return { label, color, x, y };
  });
  draw(
    "loss",
    [
      ...curves.map(({ label, color, points, hasMarks }) => ({
        type: "scatter",
        name: label,
        mode: hasMarks ? "lines+markers" : "lines",
        x: points.map(([step]) => step),
        y: points.map(([, value]) => value),
        line: { color: color, width: 1.5 },
      })),
      endLabels(ends, Math.max(...values) - Math.min(...values)),
    ],
    {
      xaxis: axis("optimizer step", { range: [0, last * 1.18] }),
      yaxis: axis("cross entropy (nats)"),
    },
  );
}

function drawDetail() {
  const dialog = byId("detail");
  if (state.row === "") return dialog.close();
  details ??= read("details");
  const row = rows[state.row];
  const detail = details.rows[row.index];
  byId("detail-title").textContent =
    `Row ${row.index + 1}: ${row.get("model")}, ${row.get("strategy") ?? "no strategy recorded"}, ${row.get("status")}`;
  byId("command").textContent = row.get("command");
  byId("log").textContent = detail.log.join("\n") || "no log lines";
  const recorded = names.filter(
    (name) => row.get(name) !== null && !["model", "rest", "also", "command"].includes(name),
  );
  list(
    "figures",
    recorded.map((name) => [name, row.get(name)]),
  );
  list(
    "config",
    detail.config === null
      ? [["", "The recipe refused the options, so there is no config."]]
      : Object.entries({ ...details.shared, ...detail.config }).sort(([one], [other]) =>
          compare(one, other),
        ),
  );
  if (!dialog.open) dialog.showModal();
  dialog.scrollTop = 0;
  return drawLoss(row, detail);
}
