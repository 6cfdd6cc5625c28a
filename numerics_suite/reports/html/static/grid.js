// The numbers behind the map: columns of the embedded data, and rows made of them.
const STATUS = { p: "passed", f: "failed", a: "accepted", s: "skipped", e: "error" };
const SIGN = { passed: "✓", failed: "×", accepted: "≈", skipped: "–", error: "!" };
const WORST = ["f", "e", "a", "p", "s"];

class Grid {
  constructor(data) {
    this.dimensions = data.dimensions;
    this.checks = data.checks;
    this.reasons = data.reasons;
    this.size = data.size;
    this.varying = data.dimensions.filter((dimension) => dimension.values.length > 1);
    this.all = Array.from({ length: data.size }, (_, at) => at);
  }

  // Names of a cell's dimensions that are not the same everywhere.
  label(cell, dimensions = this.varying) {
    const used = dimensions.length ? dimensions : [this.dimensions[1]];
    return used.map((dimension) => dimension.values[dimension.at[cell]]).filter(Boolean).join(" / ");
  }

  // Ways to make rows of cells: every cell by itself, or cells that share some dimensions.
  ways() {
    const named = (...names) => this.varying.filter((dimension) => names.includes(dimension.name));
    const ways = [{ name: "every cell", dimensions: this.varying }];
    const seen = new Set([this.varying.length]);
    for (const names of [["subject", "precision"], ["version", "subject"], ["file", "subject"], ["subject"], ["precision"], ["version"], ["file"]]) {
      const dimensions = named(...names), name = dimensions.map((dimension) => dimension.name).join(" and ");
      if (dimensions.length !== names.length || dimensions.length === this.varying.length) continue;
      if (seen.has(name)) continue;
      seen.add(name);
      ways.push({ name, dimensions });
    }
    return ways;
  }

  // Rows of one way, over the cells that are asked for.
  rows(way, cells) {
    const rows = new Map();
    for (const cell of cells) {
      let key = 0;
      for (const dimension of way.dimensions) key = key * dimension.values.length + dimension.at[cell];
      const row = rows.get(key);
      if (row) row.cells.push(cell);
      else rows.set(key, { label: this.label(cell, way.dimensions), cells: [cell] });
    }
    return [...rows.values()];
  }

  // How many results of each status a check has in some cells; null where it was not asked of any.
  tile(check, cells, status) {
    const counts = {};
    let total = 0;
    for (const cell of cells) {
      const letter = check.statuses[cell];
      if (letter === "." || (status && STATUS[letter] !== status)) continue;
      counts[letter] = (counts[letter] ?? 0) + 1;
      total += 1;
    }
    if (!total) return null;
    const worst = WORST.find((letter) => counts[letter]);
    return { status: STATUS[worst], count: counts[worst], total, counts };
  }

  // What was measured in one cell.
  measured(check, cell) {
    const value = check.values[cell];
    if (value === null || value === undefined) return "";
    const [name, limit] = check.names[check.named.length ? check.named[cell] : 0];
    return `${name} ${value}${limit === null ? "" : ` of ${limit}`}`;
  }

  reason(check, cell) {
    const at = check.reasons[cell];
    return at === undefined ? "" : this.reasons[at];
  }
}
