// Draws the efficiency of curves over devices with the ideal one.

function efficiencyLine({ panel, strategy, batch, points }, batches) {
  const at = (place) => points.map((point) => point[place]);
  const label = `${strategy}, ${batch}${also(rows[points[0][0]])}`;
  return {
    panel,
    label,
    color: color(strategy),
    symbol: SYMBOLS[batches.indexOf(batch) % SYMBOLS.length],
    middle: { x: at(1), y: at(2) },
    ideal: { x: at(1), y: at(5) },
    marks: points.map(([row, devices, value, low, high]) => ({
      x: devices,
      y: value,
      low,
      high,
      row,
      hover: `row ${row + 1}: ${label}, ${devices} devices${onNodes(row)}: ${share(value)}`,
    })),
  };
}

function onNodes(row) {
  const nodes = rows[row].get("num_nodes");
  return nodes > 1 ? ` on ${nodes} nodes` : "";
}

function drawEfficiency(drawn) {
  const shown = new Set(drawn.map((row) => row.index));
  const found = curves.filter(({ points }) => points.every(([row]) => shown.has(row)));
  byId("efficiency").hidden = found.length === 0;
  if (found.length === 0) return;
  const batches = [...new Set(found.map(({ batch }) => batch))].sort((a, b) => parseInt(a) - parseInt(b));
  const lines = found.map((curve) => efficiencyLine(curve, batches));
  drawPanels("efficiency-by-devices", lines, "devices", "efficiency (1 = linear speed-up)");
}
