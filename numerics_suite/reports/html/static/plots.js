// Plots are drawn from their tables, when they come into view: what is drawn is what the table says.
const SYMBOLS = ["circle", "square", "triangle", "diamond", "wye", "cross", "star"];
const DASHES = ["", "6 3", "2 2", "8 3 2 3", "1 3", "10 4", "4 1"];
const colour = (at) => `var(--s${(at % 8) + 1})`;

// A table that was left as text becomes one: its first line is the head, a number beyond its limit ends in "!".
function unfold(figure) {
  const text = figure.querySelector(".tsv");
  if (!text) return;
  const columns = JSON.parse(text.dataset.columns), heads = Number(text.dataset.heads);
  const [first, ...lines] = text.textContent.split("\n").map((line) => line.split("\t"));
  const head = first.map((name, at) => make("th", at < heads ? { scope: "col" } : { scope: "col", class: "n", "data-kind": columns[at - heads][0], "data-curve": columns[at - heads][1], "data-colour": columns[at - heads][2] }, name));
  const rows = lines.map((cells) => make("tr", {}, ...cells.map((cell, at) => {
    if (at === 0) return make("th", { scope: "row" }, cell);
    return at < heads ? make("td", {}, cell) : make("td", { class: cell.endsWith("!") ? "n over" : "n" }, cell.replace("!", ""));
  })));
  const caption = make("caption", {}, figure.querySelector("figcaption").textContent.trim());
  text.replaceWith(make("table", {}, caption, make("thead", {}, make("tr", {}, ...head)), make("tbody", {}, ...rows)));
}

function readTable(figure) {
  unfold(figure);
  const table = figure.querySelector("table"), heads = [...table.tHead.rows[0].cells];
  const names = heads.filter((head) => !head.dataset.kind).map((head) => head.textContent);
  const columns = heads.filter((head) => head.dataset.kind).map((head) => ({ kind: head.dataset.kind, curve: head.dataset.curve, colour: Number(head.dataset.colour) }));
  const rows = [...table.tBodies[0].rows].map((row) => {
    const texts = [...row.cells].map((cell) => cell.textContent);
    return {
      heads: Object.fromEntries(names.map((name, at) => [name, texts[at]])),
      values: texts.slice(names.length).map((text) => (text === "" ? null : Number(text))),
    };
  });
  return { curves: columns.filter((column) => column.kind === "value"), columns, rows };
}

// One point for each value: where it is, which curve, its limit.
function pointsOf({ columns, rows }) {
  const points = [];
  for (const row of rows) {
    columns.forEach((column, at) => {
      if (column.kind !== "value" || row.values[at] === null) return;
      const limit = columns.findIndex((other) => other.kind === "limit" && (other.curve === column.curve || !other.curve));
      points.push({ ...row.heads, curve: column.curve, series: column.colour, value: row.values[at], limit: limit < 0 ? null : row.values[limit] });
    });
  }
  return points;
}

const shown = (value) => (Number.isFinite(value) ? String(value) : Number.isNaN(value) ? "NaN" : value > 0 ? "Infinity" : "-Infinity");

// A logarithmic axis where values are positive and apart by more than a factor of 50; room around values that are all alike.
function scaleOf(values) {
  const finite = values.filter(Number.isFinite), least = Math.min(...finite), most = Math.max(...finite);
  if (!finite.length) return { domain: [0, 1], ticks: 0 };
  if (least === most) return { domain: [least - Math.max(Math.abs(least) * 0.1, 1e-9), most + Math.max(Math.abs(most) * 0.1, 1e-9)], ticks: 3 };
  return { type: least > 0 && most / least > 50 ? "log" : "linear", nice: true };
}

function keys(curves) {
  const list = make("ul", { class: "keys", "aria-label": "Curves" });
  curves.forEach(({ curve, colour: at }) => {
    const drawing = Plot.plot({
      width: 30, height: 14, margin: 0, axis: null, x: { domain: [0, 2] }, y: { domain: [0, 2] },
      style: { background: "none", overflow: "visible" },
      marks: [Plot.line([[0, 1], [2, 1]], { stroke: colour(at), strokeWidth: 2, strokeDasharray: DASHES[at % DASHES.length] }),
        Plot.dot([[1, 1]], { symbol: SYMBOLS[at % SYMBOLS.length], fill: colour(at), r: 4 })],
    });
    drawing.setAttribute("aria-hidden", "true");
    list.append(make("li", {}, drawing, curve));
  });
  return list;
}

// Lines and dots of every curve, each with its own dash and symbol; what is not finite is a cross at the upper edge.
function curveMarks(points, x, top, { line = true, r = 3 } = {}) {
  const finite = points.filter((point) => Number.isFinite(point.value)), bad = points.filter((point) => !Number.isFinite(point.value));
  const marks = [], crowded = finite.filter(over).length > 40;
  for (const series of new Set(points.map((point) => point.series))) {
    const own = finite.filter((point) => point.series === series);
    const lines = typeof line === "function" ? line(own) : own;
    if (line && lines.length > 1) marks.push(Plot.line(lines, { x, y: "value", stroke: colour(series), strokeWidth: 1.8, strokeDasharray: DASHES[series % DASHES.length] }));
    marks.push(Plot.dot(own.filter((point) => !over(point)), { x, y: "value", fill: colour(series), symbol: SYMBOLS[series % SYMBOLS.length], r }));
  }
  marks.push(Plot.dot(finite.filter(over), { x, y: "value", symbol: "times", stroke: "var(--failed)", strokeWidth: crowded ? 1.5 : 2.5, r: crowded ? 3.5 : 6 }));
  marks.push(Plot.dot(bad, { x, y: () => top, symbol: "times", stroke: "var(--failed)", strokeWidth: 2.5, r: 6 }));
  marks.push(Plot.text(bad, { x, y: () => top, text: (point) => shown(point.value), fill: "var(--failed)", textAnchor: "start", dx: 8, dy: -9, fontWeight: 700 }));
  return marks;
}
const over = (point) => point.limit !== null && !(point.value <= point.limit);

function topOf(points, limits = []) {
  const finite = [...points.map((point) => point.value), ...limits].filter(Number.isFinite);
  return finite.length ? Math.max(...finite) : 1;
}

const base = (width, height) => ({ width, height, marginLeft: 48, marginRight: 14, marginTop: 22, style: { background: "none", color: "var(--soft)", fontSize: "11px" } });

function tip(points, x, top, unit) {
  return Plot.tip(points, Plot.pointer({
    x, y: (point) => (Number.isFinite(point.value) ? point.value : top), fill: "var(--surface)", stroke: "var(--line)",
    title: (point) => [point.module ?? `step ${point.step}`, `${point.curve}: ${shown(point.value)} ${unit || point.unit || ""}`,
      ...(point.class ? [point.class] : []), ...(point.limit === null ? [] : [`budget ${shown(point.limit)}`])].join("\n"),
  }));
}

function drawSteps(figure, table, width) {
  const points = pointsOf(table).map((point) => ({ ...point, step: Number(point.step) }));
  const marks = JSON.parse(figure.dataset.marks ?? "[]"), top = topOf(points);
  const steps = points.map((point) => point.step), first = Math.min(...steps, ...marks.map((mark) => mark[1])), last = Math.max(...steps, ...marks.map((mark) => mark[1]));
  const moments = [...new Map(marks.map(([curve, step, text]) => [step, { step, text: text.length > 44 ? `${text.slice(0, 43)}…` : text, curve }])).values()];
  const late = (one) => one.step - first > (last - first) / 2;
  return [Plot.plot({
    ...base(width, 230), ariaLabel: `${figure.dataset.title} over steps; the table below has the numbers`,
    x: { label: "step", domain: first === last ? [first - 1, last + 1] : [first, last], ticks: Math.min(last - first, 8), tickFormat: (step) => (Number.isInteger(step) ? String(step) : "") },
    y: { label: null, grid: true, ...scaleOf(points.map((point) => point.value)) },
    marks: [
      Plot.ruleX(moments, { x: "step", stroke: "var(--failed)", strokeWidth: 1.5, strokeDasharray: "4 3" }),
      Plot.text(moments, { x: "step", text: "text", frameAnchor: "bottom", textAnchor: "start", dx: 5, dy: -6, fill: "var(--failed)", stroke: "var(--surface)", strokeWidth: 4, fontWeight: 700, filter: (one) => !late(one) }),
      Plot.text(moments, { x: "step", text: "text", frameAnchor: "bottom", textAnchor: "end", dx: -5, dy: -6, fill: "var(--failed)", stroke: "var(--surface)", strokeWidth: 4, fontWeight: 700, filter: late }),
      ...curveMarks(points, "step", top),
      tip(points, "step", top, figure.dataset.unit),
    ],
  })];
}

// Layers as positions: what comes before the first layer, the layers, what comes after the last.
function layers(points) {
  const numbers = [...new Set(points.map((point) => point.layer).filter((layer) => layer !== ""))].map(Number).sort((one, other) => one - other);
  let seen = false;
  const places = new Map();
  for (const point of points) {
    if (point.layer !== "") seen = true;
    else if (!places.has(point.module)) places.set(point.module, seen ? "out" : "in");
  }
  const domain = ["in", ...numbers.map(String), "out"].filter((name) => /\d/.test(name) || [...places.values()].includes(name));
  return { domain, at: (point) => (point.layer === "" ? places.get(point.module) : point.layer) };
}

function panel(points, domain, unit, title, width, { limits = [], floor = null } = {}) {
  const top = topOf(points, limits), every = Math.ceil(domain.length / Math.max(Math.floor(width / 26), 2));
  const worst = (own) => [...d3.rollup(own, (group) => group.reduce((one, other) => (other.value * floorSign(floor) > one.value * floorSign(floor) ? other : one)), (point) => point.place).values()];
  const drawing = Plot.plot({
    ...base(width, 170), ariaLabel: `${title} by layer; the table below has the numbers`,
    x: { type: "point", domain, label: "layer", padding: 0.4, ticks: domain.filter((name, at) => /\D/.test(name) || (at % every === 0 && domain.length - at > every / 2)) },
    y: { label: null, grid: true, nice: true, zero: true, ticks: 4, ...(top === 0 ? { domain: [0, 1] } : {}), ...(floor === null ? {} : { domain: [Math.min(0, ...points.map((point) => point.value).filter(Number.isFinite)), top] }) },
    marks: [
      ...limits.map((limit) => Plot.ruleY([limit], { stroke: "var(--failed)", strokeWidth: 1.5, strokeDasharray: "5 3" })),
      ...(floor === null ? [] : [Plot.ruleY([floor], { stroke: "var(--failed)", strokeWidth: 1.5, strokeDasharray: "5 3" })]),
      ...curveMarks(points, "place", top, { line: worst, r: 2.6 }),
      tip(points, "place", top, unit),
    ],
  });
  return make("div", { class: "panel" }, "", drawing);
}
const floorSign = (floor) => (floor === null ? 1 : -1);

// As many panels side by side as there is room for; a few are not drawn out over the whole width.
function columnsOf(count, width) {
  const columns = Math.max(Math.min(Math.floor((width + 20) / 270), count), 1);
  const each = Math.min(Math.floor((width - 20 * (columns - 1)) / columns), 560);
  return { each, style: `grid-template-columns:repeat(${columns},${each}px)` };
}

function heading(name, rest) {
  return make("p", { class: "panel-name" }, make("b", {}, name), make("span", { class: "soft" }, rest));
}

function drawModules(figure, table, width) {
  const points = pointsOf(table), { domain, at } = layers(points);
  for (const point of points) point.place = at(point);
  const classes = d3.group(points, (point) => point.class);
  const { each, style } = columnsOf(classes.size, width);
  const panels = [...classes].map(([name, own]) => {
    const limits = [...new Set(own.map((point) => point.limit).filter((limit) => limit !== null))];
    const told = limits.length ? ` · budget ${limits.map(shown).join(", ")}` : " · not judged";
    const element = panel(own, domain, figure.dataset.unit, name, each, { limits });
    element.firstChild.replaceWith(heading(name, told));
    return element;
  });
  return [make("div", { class: "panels", style }, ...panels)];
}

// Precisions have other ranges, so each has a panel of its own; 0 bits is where it overflows.
function drawBits(figure, table, width) {
  const points = pointsOf(table).map((point) => ({ ...point, limit: null })), { domain, at } = layers(points);
  for (const point of points) point.place = at(point);
  const curves = d3.group(points, (point) => point.curve), { each, style } = columnsOf(curves.size, width);
  const panels = [...curves].map(([name, own]) => {
    const element = panel(own, domain, "bits", name, each, { floor: 0 });
    const least = own.reduce((one, other) => (Number.isNaN(other.value) || other.value < one.value ? other : one));
    element.firstChild.replaceWith(heading(name, ` · least ${shown(least.value)} at ${least.module}`));
    return element;
  });
  return [make("div", { class: "panels", style }, ...panels)];
}

function drawPairs(figure, table, width) {
  const points = pointsOf(table), names = [...new Set(points.map((point) => point.module))];
  const pairs = names.map((module) => ({ module, before: points.find((point) => point.module === module && point.curve === "before")?.value, now: points.find((point) => point.module === module && point.curve === "now")?.value }))
    .filter((pair) => Number.isFinite(pair.before) && Number.isFinite(pair.now));
  const longest = Math.max(...names.map((name) => name.length), 6), left = Math.min(longest * 6.4 + 12, width * 0.45);
  return [Plot.plot({
    ...base(width, 60 + names.length * 20), marginLeft: left, marginTop: 16, ariaLabel: `${figure.dataset.title}; the table below has the numbers`,
    x: { label: figure.dataset.unit, grid: true, nice: true, zero: true }, y: { domain: names, label: null, tickFormat: (name) => (name.length * 6.4 > left ? `…${name.slice(-Math.floor(left / 6.6))}` : name) },
    marks: [
      Plot.arrow(pairs, { x1: "before", x2: "now", y1: "module", y2: "module", stroke: (pair) => (pair.now > pair.before ? "var(--failed)" : "var(--passed)"), strokeWidth: 2, headLength: 7 }),
      ...["before", "now"].map((curve, series) => Plot.dot(points.filter((point) => point.curve === curve && Number.isFinite(point.value)), { x: "value", y: "module", fill: colour(series), symbol: SYMBOLS[series], r: 4 })),
      Plot.text(points.filter((point) => !Number.isFinite(point.value)), { frameAnchor: "right", y: "module", dy: -9, text: (point) => `× ${point.curve} ${shown(point.value)}`, fill: "var(--failed)", textAnchor: "end", fontWeight: 700 }),
    ],
  })];
}

const DRAW = { steps: drawSteps, modules: drawModules, bits: drawBits, pairs: drawPairs };

function drawFigure(figure) {
  const place = figure.querySelector(".drawing"), width = Math.floor(place.clientWidth);
  if (!width || Number(figure.dataset.width) === width) return;
  figure.dataset.width = width;
  const table = readTable(figure);
  const legend = figure.dataset.kind === "bits" ? [] : [keys(table.curves)];
  place.replaceChildren(...legend, ...DRAW[figure.dataset.kind](figure, table, width));
  // One picture with one name to a screen reader; its parts say nothing without their numbers, which are in the table.
  for (const drawing of place.querySelectorAll("svg[aria-label]")) {
    drawing.setAttribute("role", "img");
    for (const part of drawing.querySelectorAll("[aria-label]")) part.removeAttribute("aria-label");
  }
}

function startPlots() {
  const figures = document.querySelectorAll("figure.plot");
  const seen = new IntersectionObserver((entries) => {
    for (const entry of entries) if (entry.isIntersecting) drawFigure(entry.target);
  }, { rootMargin: "300px" });
  for (const figure of figures) seen.observe(figure);
  let waiting = 0;
  window.addEventListener("resize", () => {
    clearTimeout(waiting);
    waiting = setTimeout(() => { for (const figure of figures) if (figure.dataset.width) drawFigure(figure); }, 200);
  });
  // On paper nothing can be opened, so what is folded is printed open; not that of thousands of cells.
  let opened = [];
  window.addEventListener("beforeprint", () => {
    const folded = [...document.querySelectorAll("details:not([open])")];
    opened = folded.length < 150 ? folded.filter((details) => !details.matches(".numbers")) : [];
    for (const details of opened) details.open = true;
    for (const figure of figures) drawFigure(figure);
  });
  window.addEventListener("afterprint", () => { for (const details of opened) details.open = false; });
}
