// The map of checks and cells: one table, of which only the rows in view exist where there are many.
const ROW = 26, MARGIN = 20, WHOLE = 60, LISTED = 30;

const make = (tag, attributes = {}, ...children) => {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
};
const sign = (status) => make("span", { class: `sign ${status}`, "aria-hidden": "true" }, SIGN[status]);

function startMap() {
  const data = document.getElementById("grid-data");
  if (!data) return () => "";
  const grid = new Grid(JSON.parse(data.textContent));
  const box = document.getElementById("grid"), detail = document.getElementById("detail"), select = document.getElementById("rows");
  const ways = grid.ways();
  select.append(...ways.map((way, at) => make("option", { value: at }, way.name)));
  const small = (way) => grid.rows(way, grid.all).length <= 130;
  select.value = Math.max(ways.findIndex(small), 0);
  if (ways.length < 2) select.closest("label").hidden = true;
  const view = { rows: [], checks: [], status: "", from: 0, to: 0, row: 0, column: 0 };
  let wanted = { text: "", status: "", group: "", subject: "", precision: "" }, words = [];
  let body, chosen = null;

  const fits = (cell, name) => {
    const dimension = grid.dimensions.find((one) => one.name === name);
    return !wanted[name] || dimension.values[dimension.at[cell]] === wanted[name];
  };

  // A word that is in the id of a check chooses columns, one that is in a cell's name chooses rows; others are the findings'.
  const choose = () => {
    const named = words.filter((word) => grid.checks.some((check) => check.id.includes(word)));
    const placed = words.filter((word) => !named.includes(word))
      .filter((word) => grid.dimensions.some((dimension) => dimension.values.some((value) => value.toLowerCase().includes(word))));
    view.status = wanted.status;
    view.checks = grid.checks.filter((check) => (!wanted.group || check.id.startsWith(`${wanted.group}.`))
      && named.every((word) => check.id.includes(word)));
    const cells = grid.all.filter((cell) => fits(cell, "subject") && fits(cell, "precision")
      && (!placed.length || placed.every((word) => grid.label(cell, grid.dimensions).toLowerCase().includes(word))));
    view.rows = grid.rows(ways[select.value], cells);
    if (view.status) view.rows = view.rows.filter((row) => view.checks.some((check) => grid.tile(check, row.cells, view.status)));
  };

  const tileText = (tile) => tile.total === 1 ? tile.status : tile.count === tile.total ? `${tile.status} in all ${tile.total}`
    : `${tile.status} in ${tile.count} of ${tile.total}`;

  const drawTile = (row, at, check, column) => {
    const tile = grid.tile(check, row.cells, view.status);
    const first = column > 0 && view.checks[column - 1].id.split(".")[0] !== check.id.split(".")[0] ? " first-of-group" : "";
    const cell = make("td", { role: "gridcell", "data-at": `${at}:${column}`, tabindex: at === view.row && column === view.column ? 0 : -1 });
    if (!tile) {
      cell.className = `tile${first}`;
      cell.setAttribute("aria-label", `${check.id}, ${row.label}: not asked`);
      return cell;
    }
    const part = tile.total > 1 && tile.count < tile.total && tile.status !== "passed";
    cell.className = `tile ${tile.status}${part ? " part" : ""}${first}`;
    cell.textContent = part ? `${SIGN[tile.status]}${tile.count > 99 ? "+" : tile.count}` : SIGN[tile.status];
    cell.setAttribute("aria-label", `${check.id}, ${row.label}: ${tileText(tile)}`);
    return cell;
  };

  const tileAt = (row, column) => body.querySelector(`[data-at="${row}:${column}"]`);
  const gap = (rows) => make("tr", { class: "gap", "aria-hidden": "true" }, make("td", { colspan: view.checks.length + 1, style: `height:${rows * ROW}px` }));

  const drawRows = () => {
    const whole = view.rows.length <= WHOLE;
    view.from = whole ? 0 : Math.max(0, Math.floor(box.scrollTop / ROW) - MARGIN);
    view.to = whole ? view.rows.length : Math.min(view.rows.length, view.from + Math.ceil(box.clientHeight / ROW) + 2 * MARGIN);
    // One tile can always be reached with Tab; what was focused stays so when rows come and go around it.
    const there = view.row >= view.from && view.row < view.to, focused = there && body.contains(document.activeElement);
    if (!there) view.row = view.from;
    const shown = view.rows.slice(view.from, view.to).map((row, offset) => make("tr", { "aria-rowindex": view.from + offset + 2 },
      make("th", { scope: "row", class: "row-name", title: row.label }, row.label),
      ...view.checks.map((check, column) => drawTile(row, view.from + offset, check, column))));
    const parts = [...shown];
    if (view.from > 0) parts.unshift(gap(view.from));
    if (view.to < view.rows.length) parts.push(gap(view.rows.length - view.to));
    body.replaceChildren(...parts);
    if (focused) tileAt(view.row, view.column)?.focus({ preventScroll: true });
  };

  const draw = () => {
    view.row = Math.min(view.row, Math.max(view.rows.length - 1, 0));
    view.column = Math.min(view.column, Math.max(view.checks.length - 1, 0));
    if (!view.rows.length || !view.checks.length) {
      box.replaceChildren(make("p", { class: "soft", style: "padding:0.6rem 0.9rem" }, "No result matches the filter."));
      return;
    }
    body = make("tbody");
    const heads = view.checks.map((check, at) => make("th", {
      scope: "col", title: `${check.id}: ${check.question}`,
      class: `check-name${at > 0 && view.checks[at - 1].id.split(".")[0] !== check.id.split(".")[0] ? " first-of-group" : ""}`,
    }, make("span", {}, check.id)));
    box.replaceChildren(make("table", { class: "map", role: "grid", "aria-label": "Checks and cells", "aria-rowcount": view.rows.length + 1 },
      make("thead", {}, make("tr", { "aria-rowindex": 1 }, make("th", { scope: "col", class: "row-name" }, ways[select.value].dimensions.map((one) => one.name).join(" / ") || "cell"), ...heads)), body));
    box.scrollTop = 0;
    drawRows();
  };

  const tell = (at, column) => {
    const row = view.rows[at], check = view.checks[column], tile = grid.tile(check, row.cells, view.status);
    const head = make("h3", {}, make("code", {}, check.id), make("span", { class: "soft" }, row.label));
    const parts = [head];
    if (check.question) parts.push(make("p", { class: "soft" }, check.question));
    if (!tile) parts.push(make("p", {}, "Not asked here."));
    else {
      const counts = WORST.filter((letter) => tile.counts[letter]).map((letter) => `${tile.counts[letter]} ${STATUS[letter]}`);
      if (tile.total > 1) parts.push(make("p", {}, counts.join(", ")));
      const order = row.cells.filter((cell) => check.statuses[cell] !== "." && (!view.status || STATUS[check.statuses[cell]] === view.status))
        .sort((one, other) => WORST.indexOf(check.statuses[one]) - WORST.indexOf(check.statuses[other]) || one - other);
      const items = order.slice(0, LISTED).map((cell) => {
        const status = STATUS[check.statuses[cell]], card = check.cards[cell];
        const told = [grid.label(cell), status, grid.measured(check, cell), grid.reason(check, cell)].filter(Boolean).join(" · ");
        return make("li", {}, sign(status), make("span", {}, told), ...(card ? [make("a", { href: `#finding-${card}` }, `finding ${card}`)] : []));
      });
      parts.push(make("ul", {}, ...items));
      if (order.length > LISTED) parts.push(make("p", { class: "soft" }, `and ${order.length - LISTED} more; choose “every cell” to see each.`));
    }
    detail.replaceChildren(...parts);
  };

  const pick = (cell) => {
    const [at, column] = cell.dataset.at.split(":").map(Number);
    chosen?.removeAttribute("aria-selected");
    body.querySelector('[tabindex="0"]')?.setAttribute("tabindex", -1);
    cell.setAttribute("tabindex", 0);
    cell.setAttribute("aria-selected", "true");
    chosen = cell;
    [view.row, view.column] = [at, column];
    tell(at, column);
  };

  const go = (row, column) => {
    const wantedRow = Math.min(Math.max(row, 0), view.rows.length - 1);
    view.column = Math.min(Math.max(column, 0), view.checks.length - 1);
    if (wantedRow < view.from || wantedRow >= view.to) box.scrollTop = Math.max(0, (wantedRow - 5) * ROW);
    const away = wantedRow < view.from || wantedRow >= view.to;
    view.row = wantedRow;
    if (away) drawRows();
    const cell = tileAt(view.row, view.column);
    cell.focus({ preventScroll: true });
    cell.scrollIntoView({ block: "nearest", inline: "nearest", behavior: "instant" });
  };

  const moves = {
    ArrowDown: () => [view.row + 1, view.column], ArrowUp: () => [view.row - 1, view.column],
    ArrowRight: () => [view.row, view.column + 1], ArrowLeft: () => [view.row, view.column - 1],
    Home: () => [view.row, 0], End: () => [view.row, view.checks.length - 1],
    PageDown: () => [view.row + 10, view.column], PageUp: () => [view.row - 10, view.column],
  };
  box.addEventListener("keydown", (event) => {
    if (!event.target.dataset.at || !moves[event.key] || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    go(...moves[event.key]());
  });
  box.addEventListener("focusin", (event) => { if (event.target.dataset.at) pick(event.target); });
  box.addEventListener("mouseover", (event) => {
    const cell = event.target.closest("[data-at]");
    if (!cell || cell.title) return;
    const [at, column] = cell.dataset.at.split(":").map(Number), row = view.rows[at], check = view.checks[column];
    const only = row.cells.length === 1 ? [grid.measured(check, row.cells[0]), grid.reason(check, row.cells[0])].filter(Boolean).join("\n") : "";
    cell.title = [cell.getAttribute("aria-label"), only].filter(Boolean).join("\n");
  });
  let frame = 0;
  box.addEventListener("scroll", () => {
    if (view.rows.length <= WHOLE || frame) return;
    frame = requestAnimationFrame(() => { frame = 0; drawRows(); });
  });
  const update = () => { choose(); draw(); };
  select.addEventListener("change", update);
  return (now, typed) => {
    [wanted, words] = [now, typed];
    update();
    return `${view.rows.length} ${view.rows.length === 1 ? "row" : "rows"} of the map`;
  };
}
