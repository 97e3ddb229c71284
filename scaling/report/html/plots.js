// Draws speed and memory of rows: a panel for each precision, a line for each configuration.

const MOST_MARKS = 500; // points a plot takes before it becomes slow
const MOST_LINES = 6; // of a panel
const MOST_TICKS = 10;
const LEAST_GAP = 0.07; // between labels in a panel, as a share of its highest point
const LEAST_WIDTH = 520; // pixels: below, panels stand below each other
const PANEL_HEIGHT = 17; // rem
const SYMBOLS = ["circle", "triangle-up", "square", "diamond", "triangle-down", "cross", "x", "star"];
// Rows that are equal in these, and in the other axis, are joined by a line.
const ALIKE = ["sweep", "rest", "conditions"];
const AXES = ["devices", "batch_size"];

// Plotly reads tags in its texts.
const plain = (text) => String(text).replaceAll("&", "&amp;").replaceAll("<", "&lt;");
const color = (strategy) => colors[strategy] ?? token("--quiet");
const token = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const also = (row) => (row.get("also") === null ? "" : `, ${row.get("also")}`);
const isAlone = (row) => row.get("sweep") === null;
const ascending = (values) => [...new Set(values)].sort((one, other) => one - other);

function groupBy(values, key) {
  const groups = new Map();
  for (const value of values) groups.set(key(value), [...(groups.get(key(value)) ?? []), value]);
  return groups;
}

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

function draw(id, traces, more) {
  const layout = {
    paper_bgcolor: "rgba(0,0,0,0)",
    plot_bgcolor: "rgba(0,0,0,0)",
    font: { color: token("--ink"), family: "system-ui, sans-serif", size: 12 },
    margin: { l: 10, r: 12, t: 26, b: 10 },
    showlegend: false,
    hovermode: "closest",
    hoverlabel: {
      bgcolor: token("--raised"),
      bordercolor: token("--line"),
      font: { color: token("--ink") },
    },
    ...more,
  };
  return Plotly.react(byId(id), traces, layout, { responsive: true, displayModeBar: false });
}

// Moves heights, from the lowest to the highest, as little as leaves a gap between neighbours:
// those that are too close move apart around their common mean.
function spread(heights, gap) {
  const mean = (block) => block.reduce((sum, value) => sum + value, 0) / block.length;
  const blocks = [];
  heights.forEach((height, index) => {
    blocks.push([height - index * gap]);
    while (blocks.length > 1 && mean(blocks.at(-2)) > mean(blocks.at(-1)))
      blocks.at(-2).push(...blocks.pop());
  });
  return blocks.flatMap((block) => block.map(() => mean(block))).map((at, i) => at + i * gap);
}

// The labels of lines, each next to the end of its line: {x, y, label, color}.
function endLabels(ends, highest) {
  const sorted = ends.toSorted((one, other) => one.y - other.y);
  return {
    type: "scatter",
    mode: "text",
    cliponaxis: false,
    x: sorted.map(({ x }) => x),
    y: spread(
      sorted.map(({ y }) => y),
      highest * LEAST_GAP,
    ),
    text: sorted.map(({ label }) => `  ${plain(label)}`),
    textposition: "middle right",
    textfont: { size: 11, color: sorted.map((end) => end.color) },
    hoverinfo: "skip",
  };
}

function lineTraces(line) {
  const at = (name) => line.marks.map((mark) => mark[name]);
  const thin = { type: "scatter", mode: "lines", hoverinfo: "skip" };
  const intervals = line.marks.some(({ low }) => (low ?? null) !== null) && {
    error_y: {
      type: "data",
      symmetric: false,
      thickness: 1.2,
      width: 3,
      array: line.marks.map(({ y, high }) => (high ?? y) - y),
      arrayminus: line.marks.map(({ y, low }) => y - (low ?? y)),
    },
  };
  return [
    ...(line.middle ? [{ ...thin, ...line.middle, line: { width: 1.4, color: line.color } }] : []),
    {
      type: "scatter",
      mode: "markers",
      x: at("x"),
      y: at("y"),
      customdata: at("row"),
      ...intervals,
      marker: { size: 7, color: line.color, symbol: line.symbol },
      hovertext: at("hover").map(plain),
      hovertemplate: "%{hovertext}<extra></extra>",
    },
  ];
}

// The best lines of a panel: those that reach farthest to the right, and of them the best there.
function bestLines(lines, isLessBetter) {
  const last = (line, name) => line.middle[name].at(-1);
  const turn = isLessBetter ? 1 : -1;
  const ranked = lines
    .filter((line) => line.middle)
    .sort(
      (one, other) =>
        last(other, "x") - last(one, "x") || turn * (last(one, "y") - last(other, "y")),
    );
  return [...ranked.slice(0, MOST_LINES), ...lines.filter((line) => !line.middle)];
}

function panelTraces(lines, highest) {
  const labelled = lines.filter((line) => line.middle);
  const ideal = labelled.find((line) => line.ideal)?.ideal;
  const lost = { label: "ideal", color: token("--quiet"), middle: ideal };
  const ends = [...labelled, ...(ideal ? [lost] : [])].map(({ label, color, middle }) => ({
    label,
    color,
    x: middle.x.at(-1),
    y: middle.y.at(-1),
  }));
  const dashed = { width: 1, color: token("--quiet"), dash: "dash" };
  return [
    ...lines.flatMap(lineTraces),
    ...(ideal
      ? [{ type: "scatter", mode: "lines", hoverinfo: "skip", ...ideal, line: dashed }]
      : []),
    ...(ends.length ? [endLabels(ends, highest)] : []),
  ];
}

function drawPanels(id, lines, xTitle, yTitle, isLessBetter = false) {
  const panels = [...groupBy(lines, ({ panel }) => panel)]
    .sort(([one], [other]) => compare(one, other))
    .map(([title, lines]) => [title, bestLines(lines, isLessBetter)]);
  const marks = panels.flatMap(([, lines]) => lines.flatMap((line) => line.marks));
  const highest = 1.08 * Math.max(...marks.map(({ y, high }) => Math.max(y, high ?? y)));
  const ticks = ascending(marks.map(({ x }) => x));
  const few = ticks.length <= MOST_TICKS ? { tickvals: ticks, ticktext: ticks.map(whole) } : {};
  const [from, to] = [Math.log10(ticks[0]), Math.log10(ticks.at(-1))];
  const margin = 0.08 * (to - from) + 0.03;
  const range = [from - margin, to + 5 * margin]; // labels stand at the right
  const columns = byId(id).clientWidth < LEAST_WIDTH ? 1 : Math.min(2, panels.length);
  const height = Math.ceil(panels.length / columns);
  byId(id).style.height = `${PANEL_HEIGHT * height}rem`;
  const more = {
    grid: { rows: height, columns, pattern: "independent", xgap: 0.14, ygap: 0.3 },
    annotations: [],
  };
  const traces = panels.flatMap(([title, lines], index) => {
    const number = index === 0 ? "" : String(index + 1);
    const isFirst = index % columns === 0;
    more[`xaxis${number}`] = axis(xTitle, { type: "log", range, ...few });
    more[`yaxis${number}`] = axis(isFirst ? yTitle : "", { range: [0, highest] });
    more.annotations.push({
      text: plain(title),
      xref: `x${number} domain`,
      yref: `y${number} domain`,
      x: 0.5,
      y: 1,
      yanchor: "bottom",
      showarrow: false,
    });
    const axes = { xaxis: `x${number}`, yaxis: `y${number}` };
    return panelTraces(lines, highest).map((trace) => ({ ...trace, ...axes }));
  });
  draw(id, traces, more);
  opensRows(id);
}

function linesOf(found, x, other, y) {
  const drawn = found.filter((row) => row.get(y.name) !== null);
  const others = ascending(drawn.map((row) => row.get(other)));
  const key = (row) =>
    JSON.stringify(
      ["precision", other, ...(isAlone(row) ? ["strategy"] : ALIKE)].map((name) => row.get(name)),
    );
  return [...groupBy(drawn, key).values()].map((group) => {
    const [first] = group;
    const launches = [...groupBy(group, (row) => row.get(x))].sort(([one], [two]) => one - two);
    const middle = {
      x: launches.map(([at]) => at),
      y: launches.map(([, rows]) => median(rows.map((row) => y.scale(row.get(y.name))))),
    };
    return {
      panel: first.get("precision"),
      label: `${first.get("strategy")}, ${first.get(other)}${also(first)}`,
      color: color(first.get("strategy")),
      symbol: SYMBOLS[others.indexOf(first.get(other)) % SYMBOLS.length],
      middle: isAlone(first) ? null : middle,
      marks: group.map((row) => ({
        x: row.get(x),
        y: y.scale(row.get(y.name)),
        row: row.index,
        hover:
          `row ${row.index + 1}: ${row.get("strategy")}, ${row.get("precision")}, compile ${row.get("compile")}, ` +
          `${row.get("devices")} x ${row.get("num_nodes")} devices, batch size ${row.get("batch_size")}${also(row)}: ` +
          `${y.format(row.get(y.name), row)}`,
      })),
    };
  });
}

function median(values) {
  const sorted = values.toSorted((one, other) => one - other);
  const half = (sorted.length - 1) / 2;
  return (sorted[Math.floor(half)] + sorted[Math.ceil(half)]) / 2;
}

function drawLegend(found) {
  const used = strategies.filter((strategy) =>
    found.some((row) => row.get("strategy") === strategy),
  );
  byId("legend").replaceChildren(
    ...used.map((strategy) => {
      const item = element("li", strategy);
      item.style.setProperty("--dot", color(strategy));
      return item;
    }),
  );
}

const hasFigures = (row) => row.get("units_per_s") !== null || row.get("peak_bytes") !== null;

// Tokens and images share no axis, nor do models: one of them is drawn.
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
    title: `${units[model]} per second`,
    scale: (value) => value,
    format: rate,
  };
  const highest = Math.max(...drawn.map((row) => row.get("peak_bytes")));
  const peak = {
    name: "peak_bytes",
    title: `peak memory per rank (${isSmall(highest) ? "MiB" : "GiB"})`,
    scale: (value) => value / 2 ** (isSmall(highest) ? 20 : 30),
    format: bytes,
  };
  for (const [id, x, y] of [
    ["rate-by-batch", "batch_size", speed],
    ["rate-by-devices", "devices", speed],
    ["peak-by-batch", "batch_size", peak],
    ["peak-by-devices", "devices", peak],
  ]) {
    const lines = linesOf(drawn, x, AXES.find((name) => name !== x), y);
    byId(id).closest("figure").hidden = lines.length === 0;
    const title = x === "devices" ? "devices per node" : "batch size per device";
    if (lines.length) drawPanels(id, lines, title, y.title, y === peak);
  }
  drawEfficiency(drawn);
}

function opensRows(id) {
  byId(id).removeAllListeners("plotly_click");
  byId(id).on("plotly_click", ({ points: [{ customdata }] }) => {
    if (customdata !== undefined) change({ row: String(customdata) });
  });
}
