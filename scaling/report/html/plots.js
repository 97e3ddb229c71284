// Rows in, plots of speed and memory out.

const MOST_MARKS = 500; // points a plot takes before it becomes slow
const MOST_TICKS = 10;
const LEAST_GAP = 0.07; // between labels in a plot, as a share of its highest point
// To be told apart on light and dark (after Tol 2021, "Colour schemes", bright and vibrant), with a
// symbol each for who sees no colour; a strategy keeps its own whatever is filtered.
const COLOURS = [
  "#7a8793",
  "#4477aa",
  "#ee7733",
  "#228833",
  "#aa3377",
  "#cc3311",
  "#33a5cc",
  "#b59b1d",
  "#009988",
];
const SYMBOLS = [
  "circle",
  "square",
  "diamond",
  "triangle-up",
  "cross",
  "x",
  "triangle-down",
  "star",
  "hexagon",
];
const SHAPES = {
  circle: "M8 2a6 6 0 1 0 .01 0z",
  square: "M3 3h10v10H3z",
  diamond: "M8 1l7 7-7 7-7-7z",
  "triangle-up": "M8 2l7 12H1z",
  cross: "M6 1h4v5h5v4h-5v5H6v-5H1V6h5z",
  x: "M4 1l4 4 4-4 3 3-4 4 4 4-3 3-4-4-4 4-3-3 4-4-4-4z",
  "triangle-down": "M8 14L1 2h14z",
  star: "M8 1l2 5h5l-4 3.5 1.5 5.5L8 12l-4.5 3L5 9.5 1 6h5z",
  hexagon: "M4 2h8l4 6-4 6H4L0 8z",
};
// Rows that are equal in these, and in the other axis, are joined by a line.
const ALIKE = ["sweep", "rest", "repeat", "conditions"];
const AXES = ["devices", "batch_size"];

// Plotly reads tags in its texts.
const plain = (text) => String(text).replaceAll("&", "&amp;").replaceAll("<", "&lt;");
const colour = (strategy) => COLOURS[strategies.indexOf(strategy) % COLOURS.length];
const symbol = (strategy) => SYMBOLS[strategies.indexOf(strategy) % SYMBOLS.length];
const token = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

function axis(title, more = {}) {
  const line = token("--line");
  return {
    title: { text: plain(title), standoff: 8 },
    gridcolor: line,
    zerolinecolor: line,
    linecolor: line,
    automargin: true,
    ...more,
  };
}

function draw(id, traces, x, y, legend) {
  const layout = {
    paper_bgcolor: "rgba(0,0,0,0)",
    plot_bgcolor: "rgba(0,0,0,0)",
    font: { color: token("--ink"), family: "system-ui, sans-serif", size: 12 },
    margin: { l: 10, r: 12, t: 8, b: 10 },
    showlegend: legend,
    legend: { x: 1, xanchor: "right", y: 1 },
    hovermode: "closest",
    xaxis: x,
    yaxis: y,
    hoverlabel: {
      bgcolor: token("--raised"),
      bordercolor: token("--line"),
      font: { color: token("--ink") },
    },
  };
  return Plotly.react(byId(id), traces, layout, { responsive: true, displayModeBar: false });
}

const also = (row) => (row.get("also") === null ? "" : `, ${row.get("also")}`);
const isAlone = (row) => row.get("sweep") === null;

function groups(found, x) {
  const kept = [...ALIKE, ...AXES.filter((name) => name !== x)];
  const made = new Map();
  for (const row of found) {
    // Runs that are in no sweep share a colour and no line.
    const alike = isAlone(row) ? ["strategy"] : kept;
    const key = JSON.stringify([isAlone(row), ...alike.map(row.get)]);
    if (!made.has(key)) made.set(key, []);
    made.get(key).push(row);
  }
  return [...made.values()];
}

function trace(group, x, beside, y) {
  const sorted = group.toSorted(
    (one, other) => one.get(x) - other.get(x) || one.index - other.index,
  );
  const strategy = sorted[0].get("strategy");
  const at = (end) => sorted.map((row) => y.scale(row.get(end) ?? row.get(y.name)));
  const [middle, low, high] = [y.name, y.low, y.high].map(at);
  return {
    type: "scatter",
    mode: isAlone(sorted[0]) ? "markers" : "lines+markers+text",
    cliponaxis: false,
    x: sorted.map((row) => row.get(x)),
    y: middle,
    customdata: sorted.map((row) => row.index),
    error_y: {
      type: "data",
      symmetric: false,
      thickness: 1.2,
      width: 3,
      array: high.map((value, index) => value - middle[index]),
      arrayminus: low.map((value, index) => middle[index] - value),
    },
    line: { width: 1.2, color: colour(strategy) },
    marker: { size: 8, color: colour(strategy), symbol: symbol(strategy) },
    text: sorted.map((row, index) => (index > 0 && index === sorted.length - 1 ? beside(row) : "")),
    textposition: "middle right",
    textfont: { size: 10 },
    hovertext: sorted.map((row) =>
      plain(
        `row ${row.index + 1}: ${strategy}, ${row.get("precision")}, compile ${row.get("compile")}, ` +
          `${row.get("devices")} x ${row.get("num_nodes")} devices, batch ${row.get("batch_size")}${also(row)}: ` +
          `${y.told(row.get(y.name), row)}`,
      ),
    ),
    hovertemplate: "%{hovertext}<extra></extra>",
  };
}

// What stands at the end of a line is left out where it would cover that of another.
function withoutOverlaps(traces) {
  const highest = Math.max(...traces.flatMap((one) => one.y));
  const kept = [];
  for (const one of traces) {
    const [x, y] = [one.x.at(-1), one.y.at(-1)];
    if (one.mode === "markers") continue;
    if (kept.some((other) => other.x === x && Math.abs(other.y - y) < highest * LEAST_GAP))
      one.text = [];
    else if (one.text.at(-1)) kept.push({ x, y });
  }
  return traces;
}

function drawPlot(id, found, x, y) {
  const drawn = found.filter((row) => row.get(y.name) !== null);
  const ticks = [...new Set(drawn.map((row) => row.get(x[0])))].sort((one, other) => one - other);
  const few = ticks.length <= MOST_TICKS ? { tickvals: ticks, ticktext: ticks.map(whole) } : {};
  const ends = ticks.length
    ? [Math.log10(ticks[0]) - 0.12, Math.log10(ticks.at(-1)) + 0.2]
    : [0, 1];
  const traces = withoutOverlaps(groups(drawn, x[0]).map((group) => trace(group, x[0], x[2], y)));
  return draw(
    id,
    traces,
    axis(x[1], { type: "log", range: ends, ...few }),
    axis(y.title, { rangemode: "tozero" }),
    false,
  );
}

function drawLegend(found) {
  const used = strategies.filter((strategy) =>
    found.some((row) => row.get("strategy") === strategy),
  );
  byId("legend").replaceChildren(
    ...used.map((strategy) => {
      const mark = document.createElementNS("http://www.w3.org/2000/svg", "svg");
      const path = document.createElementNS("http://www.w3.org/2000/svg", "path");
      mark.setAttribute("viewBox", "0 0 16 16");
      mark.setAttribute("aria-hidden", "true");
      path.setAttribute("d", SHAPES[symbol(strategy)]);
      path.setAttribute("fill", colour(strategy));
      mark.append(path);
      const item = element("li");
      item.append(mark, strategy);
      return item;
    }),
  );
}

const hasFigures = (row) => row.get("units_per_s") !== null || row.get("peak_bytes") !== null;

// Tokens and pictures share no axis, nor do models: one of them is drawn.
function modelOf(found) {
  const numbers = new Map();
  for (const row of found) {
    if (!hasFigures(row)) continue;
    numbers.set(row.get("model"), (numbers.get(row.get("model")) ?? 0) + 1);
  }
  return [...numbers].sort((one, other) => other[1] - one[1])[0]?.[0];
}

function drawPlots(found) {
  const model = modelOf(found);
  const drawn = found
    .filter((row) => row.get("model") === model && hasFigures(row))
    .sort((one, other) => one.index - other.index);
  const steady = drawn.filter((row) => row.get("units_per_s") !== null).length;
  const without =
    steady < drawn.length
      ? ` ${whole(drawn.length - steady)} of them have no steady state, and so no speed.`
      : "";
  const isDrawn = drawn.length > 0 && drawn.length <= MOST_MARKS;
  byId("plots").hidden = !isDrawn;
  byId("plots-say").textContent =
    drawn.length === 0
      ? "No row that is shown has figures to draw."
      : isDrawn
        ? `${model}, ${whole(drawn.length)} of the rows that are shown` +
          (state.model === "" && Object.keys(units).length > 1
            ? "; choose another model above."
            : ".") +
          without
        : `${model}: ${whole(drawn.length)} rows are too many to draw; filter to at most ${whole(MOST_MARKS)}.`;
  drawLegend(isDrawn ? drawn : []);
  if (!isDrawn) return;
  const speed = {
    name: "units_per_s",
    low: "low_units_per_s",
    high: "high_units_per_s",
    title: `${units[model]}/s`,
    scale: (value) => value,
    told: rate,
  };
  const highest = Math.max(...drawn.map((row) => row.get("peak_bytes")));
  const peak = {
    name: "peak_bytes",
    low: "least_peak_bytes",
    high: "peak_bytes",
    title: isSmall(highest) ? "MiB" : "GiB",
    scale: (value) => value / 2 ** (isSmall(highest) ? 20 : 30),
    told: bytes,
  };
  const batch = [
    "batch_size",
    "samples a device takes at once",
    (row) => ` x ${row.get("devices")}${also(row)}`,
  ];
  const devices = ["devices", "devices on each node", (row) => ` batch ${row.get("batch_size")}${also(row)}`];
  for (const [id, x, y] of [
    ["rate-by-batch", batch, speed],
    ["rate-by-devices", devices, speed],
    ["peak-by-batch", batch, peak],
    ["peak-by-devices", devices, peak],
  ]) {
    drawPlot(id, drawn, x, y);
    opensRows(id);
  }
  drawEfficiency(drawn);
}

function opensRows(id) {
  byId(id).removeAllListeners("plotly_click");
  byId(id).on("plotly_click", ({ points: [{ customdata }] }) => {
    if (customdata !== undefined) change({ row: String(customdata) });
  });
}
