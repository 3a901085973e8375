"use strict";
/* Draws the report from the JSON in #data. Text from the runs is set as textContent only, never as HTML. */

const AXES = {
  step: { label: "steps", values: run => run.x.step },
  tokens: { label: "tokens", values: run => run.x.tokens },
  flops: { label: "FLOPs", values: run => run.flops_per_token && scale(run.x.tokens, run.flops_per_token) },
  time: { label: "hours", values: run => scale(run.x.time, 1 / 3600) },
  hours: { label: "GPU hours", values: run => run.x.hours },
};
const COLOURS = 7, DASHES = [[], [7, 4], [2, 3], [9, 3, 2, 3]];
const state = { axis: "step", raw: true, log: false, start: false, zoom: null, hidden: new Set(), sample: null };
let data = JSON.parse(document.getElementById("data").textContent);
let plots = [];

const scale = (values, factor) => values && values.map(x => x * factor);
const byId = id => document.getElementById(id);
const css = name => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const colour = i => `var(--run-${i % COLOURS})`;
const paint = i => css(`--run-${i % COLOURS}`);
const dash = i => DASHES[Math.floor(i / COLOURS) % DASHES.length];

/** Returns an element. Attributes that are functions are listeners; children are elements or text. */
function el(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (typeof value === "function") element.addEventListener(name, value);
    else if (name === "style") element.style.cssText = value;
    else if (typeof value === "boolean") element[name] = value;
    else if (value !== undefined) element.setAttribute(name, value);
  }
  element.append(...children.filter(child => child !== null));
  return element;
}

/* --- numbers --- */

function short(x) {
  const size = Math.abs(x);
  if (x === 0) return "0";
  if (size < 1e-3 || size >= 1e15) return x.toExponential(2).replace(/\.?0+e/, "e");
  for (const [least, unit] of [[1e12, "T"], [1e9, "B"], [1e6, "M"], [1e4, "K"]])
    if (size >= least) return trim(x / (unit === "K" ? 1e3 : least), 4) + unit;
  return trim(x, 5);
}
/** A label of an axis: shorter than a value, 5K instead of 5000. */
const tickText = x => x >= 1e3 && x < 1e4 ? `${trim(x / 1e3, 4)}K` : short(x);
const trim = (x, digits) => String(Number(x.toPrecision(digits)));
const KINDS = {
  loss: x => x.toFixed(4), number: short, count: short, seconds: x => `${trim(x, 3)} s`,
  share: x => `${trim(100 * x, 4)} %`,
  bytes: x => x >= 2 ** 30 ? `${trim(x / 2 ** 30, 4)} GiB` : `${trim(x / 2 ** 20, 4)} MiB`,
};
const tick = kind => ["loss", "number", "count"].includes(kind) ? tickText : KINDS[kind];
const NOISY = ["grad_norm", "tok_per_s", "mfu"]; // drawn thin
const BYTE_STEPS = Array.from({ length: 50 }, (_, k) => 2 ** k);

/* --- curves --- */

/** Returns [x, y] of one column of a run on the chosen axis, without the places where it has no values. */
function points(run, column) {
  const x = AXES[state.axis].values(run), values = run.series[column];
  if (!x || !values) return [[], []];
  return Array.isArray(values) ? [x, values] : [values.at.map(i => x[i]), values.values];
}

/** Returns the place of a step on the chosen axis: that of the first shown row at or after it. */
function place(run, step) {
  const x = AXES[state.axis].values(run);
  const row = run.x.step.findIndex(s => s >= step);
  return !x || row < 0 ? null : x[row];
}

/** Returns where on the chosen axis a superseded record was. */
function supersededPlace(run, [step, tokens, time]) {
  if (state.axis === "step") return step;
  if (state.axis === "time") return time === null ? null : time / 3600;
  if (tokens !== null && state.axis === "tokens") return tokens;
  if (tokens !== null && state.axis === "flops" && run.flops_per_token) return tokens * run.flops_per_token;
  return place(run, step);
}

/** The curves of a chart: one for each run and column that has points. Columns after the first are thin or dashed. */
function curvesOf(chart) {
  const found = [];
  data.runs.forEach((run, i) => chart.columns.forEach((column, nth) => {
    if (column === "loss" && !state.raw) return;
    const [x, y] = points(run, column);
    if (x.length) found.push({ run: i, column, nth, x, y, faint: column === "loss" });
  }));
  return found.sort((a, b) => b.faint - a.faint);
}

function seriesOf(curve) {
  const { run, nth, faint, x } = curve;
  const few = x.length <= 80, dense = x.length > 1000 && NOISY.includes(curve.column);
  return {
    show: !state.hidden.has(run), spanGaps: false, stroke: () => paint(run), alpha: faint ? 0.35 : dense ? 0.8 : 1,
    width: faint || dense ? 1 : 1.75, dash: nth && !faint ? [4, 4] : dash(run),
    points: { show: few && !faint, size: 5, fill: () => paint(run) },
  };
}

function makePlot(chart, parent) {
  const curves = curvesOf(chart);
  const wide = parent.parentElement.matches(":first-child");
  const logarithmic = state.log && chart.log;
  const axis = more => ({ stroke: () => css("--soft"), grid: { stroke: () => css("--line"), width: 1 },
    ticks: { stroke: () => css("--line"), width: 1, size: 4 }, font: "11.5px system-ui, sans-serif", ...more });
  const options = {
    width: parent.clientWidth, height: wide ? 340 : 230, legend: { show: false }, padding: [8, 12, 0, 0],
    scales: {
      x: { time: false, range: () => state.zoom ?? extent() },
      y: { distr: logarithmic ? 3 : 1, range: (u, low, high) => rangeOf(chart, ...withoutStart(u, chart, curves, low, high), logarithmic) },
    },
    series: [{}, ...curves.map(seriesOf)],
    axes: [axis({ values: (u, at) => at.map(tickText), size: 30, space: 70 }),
      axis({ values: (u, at) => at.map(v => v === null ? "" : tick(chart.kind)(v)), size: 64,
        ...(chart.kind === "bytes" ? { incrs: BYTE_STEPS } : {}) })],
    cursor: { drag: { x: true, y: false, setScale: false }, points: { show: false },
      bind: { dblclick: () => () => { setZoom(null); return null; } } },
    hooks: {
      draw: [u => { drawReferences(u, chart, curves); drawMarks(u, chart); }],
      setSelect: [u => {
        if (u.select.width < 4) return;
        setZoom([u.posToVal(u.select.left, "x"), u.posToVal(u.select.left + u.select.width, "x")]);
        u.setSelect({ left: 0, top: 0, width: 0, height: 0 }, false);
      }],
      setCursor: [u => showTip(u, chart, curves)],
    },
  };
  const joined = curves.length ? uPlot.join(curves.map(c => [c.x, c.y])) : [[]];
  const plot = new uPlot(options, joined, parent);
  plot.curves = curves;
  plot.tip = el("div", { class: "tip", hidden: true });
  parent.append(plot.tip);
  parent.addEventListener("mouseleave", () => { plot.tip.hidden = true; });
  return plot;
}

/** The smallest and largest value without the first 5 % of the curves, which would squeeze the rest of a loss curve. */
function withoutStart(u, chart, curves, low, high) {
  const seen = curves.filter(c => !state.hidden.has(c.run) && c.x.length > 40);
  if (!chart.falls || state.start || state.zoom || !seen.length) return [low, high];
  const from = 0.05 * Math.max(...seen.map(c => c.x.at(-1)));
  const values = seen.flatMap(c => c.y.filter((y, i) => c.x[i] >= from && y !== null));
  return values.length ? [smallest(values), -smallest(values.map(y => -y))] : [low, high];
}
const smallest = values => values.reduce((a, b) => a < b ? a : b);

/** The range of the y axis: around the values, and for HellaSwag up to the next published line. */
function rangeOf(chart, low, high, logarithmic) {
  if (low === null) return logarithmic ? [0.1, 1] : [0, 1];
  const lines = chart.columns.flatMap(column => Object.values(data.references[column] ?? {}));
  const above = lines.filter(y => y > high && y - high <= high - low);
  if (above.length) high = Math.min(...above);
  if (logarithmic) return low > 0 ? [low / 1.05, high * 1.05] : uPlot.rangeLog(low, high, 10, true);
  const margin = 0.06 * (high - low) || Math.abs(high) * 0.05 || 1;
  return [low >= 0 ? Math.max(0, low - margin) : low - margin, high + margin];
}

function drawReferences(u, chart, curves) {
  const { ctx, bbox } = u;
  ctx.save();
  ctx.font = `${11 * devicePixelRatio}px system-ui, sans-serif`;
  ctx.fillStyle = ctx.strokeStyle = css("--soft");
  chart.columns.forEach((column, nth) => {
    if (!curves.some(c => c.column === column)) return;
    for (const [name, value] of Object.entries(data.references[column] ?? {})) {
      const y = u.valToPos(value, "y", true);
      if (y < bbox.top || y > bbox.top + bbox.height) continue;
      ctx.setLineDash([4 * devicePixelRatio, (nth ? 8 : 4) * devicePixelRatio]);
      ctx.beginPath(); ctx.moveTo(bbox.left, y); ctx.lineTo(bbox.left + bbox.width, y); ctx.stroke();
      const text = nth ? `${name}, lm_eval` : name, place = [bbox.left + 6 * devicePixelRatio, y - 2];
      ctx.setLineDash([]); ctx.lineWidth = 3 * devicePixelRatio; ctx.strokeStyle = css("--card");
      ctx.textAlign = "left"; ctx.textBaseline = "bottom";
      ctx.strokeText(text, ...place); ctx.fillText(text, ...place);
      ctx.lineWidth = devicePixelRatio; ctx.strokeStyle = css("--soft");
    }
  });
  ctx.restore();
}

/** Marks events: resumes and roll-backs as lines, skipped steps as crosses, superseded records as small circles. */
function drawMarks(u, chart) {
  const { ctx, bbox } = u, px = devicePixelRatio, column = chart.columns.at(-1);
  ctx.save();
  ctx.beginPath(); ctx.rect(bbox.left, bbox.top, bbox.width, bbox.height); ctx.clip();
  ctx.lineWidth = px;
  data.runs.forEach((run, i) => {
    if (state.hidden.has(i)) return;
    ctx.strokeStyle = ctx.fillStyle = paint(i);
    const line = (step, dashes) => {
      const at = place(run, step);
      if (at === null) return;
      const x = Math.round(u.valToPos(at, "x", true));
      ctx.setLineDash(dashes.map(n => n * px));
      ctx.beginPath(); ctx.moveTo(x, bbox.top); ctx.lineTo(x, bbox.top + bbox.height); ctx.stroke();
    };
    ctx.globalAlpha = 0.55;
    run.marks.resumes.forEach(step => line(step, [2, 4]));
    run.marks.rollbacks.forEach(([step, to]) => line(to ?? step, [8, 3]));
    ctx.globalAlpha = 0.8; ctx.setLineDash([]);
    const field = { loss: 3, grad_norm: 4 }[column];
    if (field) for (const record of run.marks.superseded) {
      const at = supersededPlace(run, record), value = record[field];
      if (at === null || value === null) continue;
      ctx.beginPath(); ctx.arc(u.valToPos(at, "x", true), u.valToPos(value, "y", true), 2 * px, 0, 7); ctx.stroke();
    }
    if (field) for (const [step] of run.marks.skipped) {
      const at = place(run, step);
      if (at === null) continue;
      const x = u.valToPos(at, "x", true), y = bbox.top + bbox.height - 6 * px, r = 3.5 * px;
      ctx.lineWidth = 1.5 * px;
      ctx.beginPath(); ctx.moveTo(x - r, y - r); ctx.lineTo(x + r, y + r); ctx.moveTo(x - r, y + r); ctx.lineTo(x + r, y - r);
      ctx.stroke(); ctx.lineWidth = px;
    }
  });
  ctx.restore();
}

/** Shows the values of every visible run at the cursor. */
function showTip(u, chart, curves) {
  const { left, top } = u.cursor, tip = u.tip;
  if (!tip) return;
  tip.hidden = left === undefined || left < 0;
  if (tip.hidden) return;
  const at = u.posToVal(left, "x");
  const there = curves.filter(c => !state.hidden.has(c.run) && at >= c.x[0] && at <= c.x.at(-1));
  const rows = there.sort((a, b) => a.nth - b.nth || a.run - b.run).map(c => {
    const row = nearest(c.x, at), y = c.y[row];
    const what = c.column === "smoothed" ? "smoothed" : chart.columns.length > 1 && c.column !== chart.columns[0] ? label(c.column) : "";
    return el("div", { style: `--colour: ${colour(c.run)}` },
      el("span", {}, el("i"), data.runs[c.run].name, what ? ` ${what}` : ""),
      el("b", {}, y === null || y === undefined ? "–" : KINDS[chart.kind](y)));
  });
  tip.replaceChildren(el("div", {}, el("span", {}, `${state.axis === "step" ? Math.round(at).toLocaleString("en") : short(at)} ${AXES[state.axis].label}`)), ...rows);
  const width = u.over.clientWidth, space = u.over.offsetLeft;
  tip.style.top = `${Math.max(0, Math.min(top + 12, u.over.clientHeight - tip.offsetHeight))}px`;
  if (left < width / 2) { tip.style.left = `${space + left + 14}px`; tip.style.right = "auto"; }
  else { tip.style.right = `${width - left + 26}px`; tip.style.left = "auto"; }
}
const label = column => ({ loss: "raw", hellaswag_lm_eval_acc_norm: "lm_eval" })[column] ?? column;

function nearest(sorted, value) {
  let low = 0, high = sorted.length - 1;
  while (high - low > 1) { const middle = (low + high) >> 1; if (sorted[middle] < value) low = middle; else high = middle; }
  return value - sorted[low] <= sorted[high] - value ? low : high;
}

/** Returns the ends of the x axis: of all visible runs, so that the charts can be compared. */
function extent() {
  const ends = data.runs.filter((run, i) => !state.hidden.has(i)).map(run => AXES[state.axis].values(run))
    .filter(x => x && x.length).flatMap(x => [x[0], x.at(-1)]);
  if (!ends.length) return [0, 1];
  const low = Math.min(...ends), high = Math.max(...ends);
  return low === high ? [low - 1, high + 1] : [low, high];
}

/** Zooms all charts to [low, high] of the x axis, or shows everything. */
function setZoom(range) {
  state.zoom = range;
  const [low, high] = range ?? extent();
  for (const u of plots) if (u.data[0].length) u.setScale("x", { min: low, max: high });
  byId("reset").disabled = !range;
}

/** Arrows pan, + and - zoom, 0 or Escape shows everything. */
function onKey(event) {
  const [low, high] = state.zoom ?? extent(), width = high - low, middle = (low + high) / 2;
  const move = {
    ArrowLeft: [low - width / 5, high - width / 5], ArrowRight: [low + width / 5, high + width / 5],
    "+": [middle - width / 4, middle + width / 4], "=": [middle - width / 4, middle + width / 4],
    "-": [middle - width, middle + width], 0: null, Escape: null,
  };
  if (!(event.key in move) || event.ctrlKey || event.metaKey) return;
  event.preventDefault();
  setZoom(move[event.key]);
}

function drawCharts() {
  for (const u of plots) u.destroy();
  const boxes = data.charts.map(chart => {
    const missing = data.runs.filter(run => chart.columns.some(c => run.series[c]) && !AXES[state.axis].values(run));
    const note = missing.length ? `not recorded on this axis: ${missing.map(run => run.name).join(", ")}` : "";
    const title = chart.columns[0] === "smoothed" ? `averaged over about ${short(data.span)} records` + (state.raw ? "; thin: raw" : "") : "";
    const plot = el("div", { class: "plot", tabindex: "0", keydown: onKey, role: "group", "aria-label": `${chart.title}: arrow keys pan, plus and minus zoom` });
    return [chart, plot, el("div", { class: "chart" }, el("h3", {}, chart.title, el("small", {}, [title, note].filter(Boolean).join("; "))), plot)];
  });
  byId("charts").replaceChildren(...boxes.map(([, , box]) => box));
  plots = boxes.map(([chart, plot]) => makePlot(chart, plot));
  byId("reset").disabled = !state.zoom;
}

/* --- the rest of the page --- */

function badge(status) {
  const kind = status === "done" ? "good" : status === "running" ? "busy" : /error|diverged|running\?/.test(status) ? "bad" : "";
  return el("span", { class: `badge ${kind}` }, status);
}

function drawCards() {
  byId("cards").replaceChildren(...data.runs.map((run, i) => {
    const share = run.last_step && run.step !== null ? Math.min(1, run.step / run.last_step) : null;
    return el("button", { class: "card", type: "button", style: `--colour: ${colour(i)}`, "aria-pressed": String(!state.hidden.has(i)),
      title: "show or hide the curves of this run", click: event => toggle(i, event.currentTarget) },
      el("div", { class: "top" }, el("span", { class: "name" }, run.name), badge(run.status)),
      share === null ? null : el("div", { class: "bar", title: `step ${run.step} of ${run.last_step}` }, el("div", { style: `width: ${100 * share}%` })),
      el("div", { class: "numbers" }, ...(run.headline.length ? run.headline : [["records", "none yet"]])
        .map(([name, value]) => el("div", {}, el("span", {}, name), el("b", {}, value)))));
  }));
}

function toggle(i, card) {
  if (!state.hidden.delete(i)) state.hidden.add(i);
  card.setAttribute("aria-pressed", String(!state.hidden.has(i)));
  for (const u of plots) u.curves.forEach((c, k) => { if (c.run === i) u.setSeries(k + 1, { show: !state.hidden.has(i) }); });
  setZoom(state.zoom);
  for (const u of plots) u.redraw(false);
}

function check(text, name) {
  return el("label", { class: "check" }, el("input", { type: "checkbox", checked: state[name],
    change: event => { state[name] = event.target.checked; drawCharts(); } }), text);
}

function drawControls() {
  const axes = Object.entries(AXES).map(([name, axis]) => {
    const usable = data.runs.some(run => axis.values(run));
    return el("label", {}, el("input", { type: "radio", name: "axis", value: name, checked: state.axis === name, disabled: !usable,
      change: () => { state.axis = name; state.zoom = null; drawCharts(); } }), axis.label);
  });
  byId("controls").replaceChildren(
    el("fieldset", {}, el("legend", {}, "x axis"), el("div", { class: "choices" }, ...axes)),
    check("raw loss", "raw"), check("fit y to the start", "start"), check("logarithmic y", "log"),
    el("button", { id: "reset", class: "plain", type: "button", disabled: true, click: () => setZoom(null) }, "show all"),
    el("span", { class: "note", style: "margin: 0" }, "drag in a chart to zoom, double-click to show all"));
}

function drawTable({ title, head, rows, note }) {
  const names = data.runs.map(run => run.name);
  const heading = (text, k) => {
    const run = k ? names.indexOf(text) : -1;
    return el("th", { scope: "col", style: run < 0 ? undefined : `--colour: ${colour(run)}` }, run < 0 ? "" : el("i"), text);
  };
  const body = rows.map(([first, ...cells]) => el("tr", {}, el("th", { scope: "row" }, first), ...cells.map(cell => el("td", {}, cell))));
  return [el("h2", {}, title),
    rows.length ? el("div", { class: "scroll", tabindex: "0" }, el("table", {}, el("thead", {}, el("tr", {}, ...head.map(heading))), el("tbody", {}, ...body))) : null,
    note ? el("p", { class: "note" }, note) : null].filter(Boolean);
}

function drawSamples() {
  const all = data.samples;
  if (!all.length) return byId("samples").replaceChildren();
  let at = all.findIndex(entry => entry.step === state.sample);
  if (at < 0) at = all.length - 1;
  const step = el("output", {}), texts = el("div", { class: "texts" });
  const show = k => {
    state.sample = k === all.length - 1 ? null : all[k].step;
    step.textContent = `step ${all[k].step.toLocaleString("en")}`;
    texts.replaceChildren(...all[k].texts.map((text, i) => [text, i])
      .filter(([, i]) => all.some(entry => entry.texts[i] !== null))
      .map(([text, i]) => el("div", {}, el("h3", { style: `color: ${colour(i)}` }, data.runs[i].name), el("pre", {}, text ?? "no sample at this step"))));
  };
  byId("samples").replaceChildren(el("h2", {}, "Samples"), el("div", { class: "picker" },
    el("input", { type: "range", min: "0", max: String(all.length - 1), value: String(at), "aria-label": "step of the samples", input: event => show(Number(event.target.value)) }), step), texts);
  show(at);
}

function drawWarnings() {
  const found = data.runs.filter(run => run.warnings.length);
  const lists = found.flatMap(run => [el("h3", {}, run.name), el("ul", {}, ...run.warnings.map(([line, times]) => el("li", {}, times > 1 ? `${line} (${times} times)` : line)))]);
  byId("warnings").replaceChildren(...(found.length ? [el("h2", {}, "Warnings"), ...lists] : []));
}

function drawKey() {
  const marks = data.runs.map(run => run.marks), some = name => marks.some(m => m[name].length);
  const parts = [some("resumes") && "dotted lines: resumes", some("rollbacks") && "dashed lines: roll-backs",
    some("skipped") && "×: skipped steps", some("superseded") && "circles: records superseded by a resume or a roll-back"];
  byId("key").textContent = parts.filter(Boolean).join(" · ");
}

function drawAll() {
  document.title = `${data.runs.map(run => run.name).join(", ").slice(0, 80)} – rawgpt report`;
  byId("made").textContent = (LIVE ? "live, last change " : "made ") + data.made;
  drawCards(); drawControls(); drawCharts(); drawKey();
  byId("tables").replaceChildren(...[...data.tables, data.facts].flatMap(drawTable));
  drawSamples(); drawWarnings();
}

async function poll() {
  try {
    const reply = await fetch(`data.json?have=${encodeURIComponent(data.version ?? "")}`);
    if (reply.status === 200) { data = await reply.json(); drawAll(); }
    byId("made").textContent = `live, last change ${data.made}`;
  } catch {
    byId("made").textContent = `the server does not answer; last change ${data.made}`;
  }
  setTimeout(poll, 3000);
}

drawAll();
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => plots.forEach(u => u.redraw()));
let width = innerWidth;
addEventListener("resize", () => {
  if (innerWidth === width) return;
  width = innerWidth;
  for (const u of plots) u.setSize({ width: u.root.parentElement.clientWidth, height: u.height });
});
if (LIVE) setTimeout(poll, 3000);
