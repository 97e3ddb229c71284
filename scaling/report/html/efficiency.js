// Curves over devices in, their efficiency beside the one that loses nothing out.

function efficiencyTrace({ strategy, name, points }) {
  const at = (place) => points.map((point) => point[place]);
  const [middle, low, high] = [at(2), at(3), at(4)];
  return {
    type: "scatter",
    mode: "lines+markers+text",
    cliponaxis: false,
    x: at(1),
    y: middle,
    customdata: at(0),
    error_y: {
      type: "data",
      symmetric: false,
      thickness: 1.2,
      width: 3,
      array: middle.map((value, index) => (high[index] ?? value) - value),
      arrayminus: middle.map((value, index) => value - (low[index] ?? value)),
    },
    line: { width: 1.2, color: colour(strategy), dash: name.endsWith("in all") ? "dash" : "solid" },
    marker: { size: 8, color: colour(strategy), symbol: symbol(strategy) },
    text: points.map((_, index) => (index === points.length - 1 ? ` ${name}` : "")),
    textposition: "middle right",
    textfont: { size: 10 },
    hovertext: points.map(([row, devices, value]) =>
      plain(`row ${row + 1}: ${strategy}, ${name}, ${devices} devices: ${share(value)}`),
    ),
    hovertemplate: "%{hovertext}<extra></extra>",
  };
}

function idealTrace({ points }) {
  return {
    type: "scatter",
    mode: "lines",
    x: points.map((point) => point[1]),
    y: points.map((point) => point[5]),
    line: { width: 2.5, color: token("--quiet"), dash: "dot" },
    hoverinfo: "skip",
  };
}

function drawEfficiency(drawn) {
  const shown = new Set(drawn.map((row) => row.index));
  const found = curves.filter(({ points }) => points.every(([row]) => shown.has(row)));
  byId("efficiency").hidden = found.length === 0;
  if (found.length === 0) return;
  const ideals = new Map(
    found.map((curve) => {
      const line = curve.points.map((point) => [point[1], point[5]]);
      return [JSON.stringify(line), curve];
    }),
  );
  const counts = found.flatMap(({ points }) => points.map((point) => point[1]));
  const ticks = [...new Set(counts)].sort((one, other) => one - other);
  const few = ticks.length <= MOST_TICKS ? { tickvals: ticks, ticktext: ticks.map(whole) } : {};
  const ends = [Math.log10(ticks[0]) - 0.12, Math.log10(ticks.at(-1)) + 0.2];
  draw(
    "efficiency-by-devices",
    [
      ...[...ideals.values()].map(idealTrace),
      ...withoutOverlaps(found.map(efficiencyTrace)),
    ],
    axis("devices", { type: "log", range: ends, ...few }),
    axis("speed over the ideal one", { rangemode: "tozero" }),
    false,
  );
  opensRows("efficiency-by-devices");
}
