// The rows of the page, and which of them are shown in which order: the state is in the address.

const PAGE = 500; // rows put into the table at once

const byId = (id) => document.getElementById(id);
const read = (id) => JSON.parse(byId(id).textContent);
const { names, rows: values, strategies, colors, units, curves } = read("rows");
const place = Object.fromEntries(names.map((name, index) => [name, index]));
const rows = values.map((row, index) => ({ index, get: (name) => row[place[name]], row }));

const number = (digits) =>
  new Intl.NumberFormat("en-US", { minimumFractionDigits: digits, maximumFractionDigits: digits })
    .format;
const [whole, tenths, hundredths] = [number(0), number(1), number(2)];
const share = (value) => `${tenths(value * 100)} %`;
const isSmall = (value) => value < 2 ** 30 / 10;
const bytes = (value) =>
  isSmall(value) ? `${tenths(value / 2 ** 20)} MiB` : `${hundredths(value / 2 ** 30)} GiB`;
const ms = (value) => `${(value < 0.1 ? hundredths : tenths)(value * 1000)} ms`;
const plainRate = (value) => (value >= 100 ? whole : hundredths)(value);
const rate = (value, row) => `${plainRate(value)} ${row.get("unit")}/s`;
const asText = (value) => String(value);

const COLUMNS = [
  ["model", "model", asText],
  ["strategy", "strategy", asText],
  ["devices", "devices", whole],
  ["batch_size", "batch", whole],
  ["precision", "precision", asText],
  ["compile", "compile", asText],
  ["status", "status", asText],
  ["units_per_s", "speed", rate],
  ["low_units_per_s", "from", plainRate],
  ["high_units_per_s", "to", plainRate],
  ["peak_bytes", "peak memory", bytes],
  ["mfu_matmul", "MFU", share],
  ["share_of_ceiling_matmul", "of ceiling", share],
  ["median_step_s", "step", ms],
  ["units_per_s_per_device", "per device", rate],
  ["peak_resident_bytes", "resident", bytes],
  ["validation_loss", "validation", number(4)],
  ["parity", "loss parity", asText],
  ["activation_checkpointing", "checkpointing", asText],
  ["num_nodes", "nodes", whole],
  ["global_batch_size", "global batch", whole],
  ["repeat", "repeat", whole],
  ["sweep", "sweep", asText],
  ["flags", "flags", asText],
  ["reason", "reason", asText],
].filter(([name]) => rows.some((row) => row.get(name) !== null && row.get(name) !== ""));
const NUMBERS = new Set(
  names.filter((name) => rows.some((row) => typeof row.get(name) === "number")),
);

// All of it is in the address, which can be stored and sent.
const START = { text: "", status: "", model: "", sort: "", down: "", row: "" };
let state = START;

function fromAddress() {
  const given = Object.fromEntries(new URLSearchParams(location.hash.slice(1)));
  state = Object.fromEntries(
    Object.entries(START).map(([name, start]) => [name, given[name] ?? start]),
  );
  if (!names.includes(state.sort)) state.sort = "";
  if (!rows[state.row]) state.row = "";
}

function change(changes) {
  state = { ...state, ...changes };
  const set = Object.entries(state).filter(([, value]) => value !== "");
  history.replaceState(null, "", `#${new URLSearchParams(set)}`);
  const touched = Object.keys(changes);
  show({
    table: touched.some((name) => name !== "row"),
    plots: touched.some((name) => ["text", "status", "model"].includes(name)),
  });
}

function matches(row, wanted) {
  return wanted.every((word) => {
    const [, name, value] = /^(\w+):(.*)$/.exec(word) ?? [];
    if (name in place) {
      const held = row.get(name);
      if (held === null) return value === "";
      return NUMBERS.has(name) ? String(held) === value : String(held).toLowerCase().includes(value);
    }
    row.searched ??= row.row
      .filter((held) => held !== null)
      .join("\n")
      .toLowerCase();
    return row.searched.includes(word);
  });
}

function compare(one, other) {
  if (one === null || other === null) return 0;
  return one < other ? -1 : Number(one > other);
}

function chosen() {
  const wanted = state.text.toLowerCase().split(/\s+/).filter(Boolean);
  const found = rows.filter(
    (row) =>
      (state.status === "" || row.get("status") === state.status) &&
      (state.model === "" || row.get("model") === state.model) &&
      matches(row, wanted),
  );
  if (state.sort === "") return found;
  const turn = state.down ? -1 : 1;
  return found.sort((one, other) => {
    const [a, b] = [one.get(state.sort), other.get(state.sort)];
    return (a === null) - (b === null) || turn * compare(a, b) || one.index - other.index; // blanks last
  });
}
