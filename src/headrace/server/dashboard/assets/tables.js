/**
 * Tables that keep their rows: a row belongs to a key and only changed cells are written, so that selections, focus
 * and screen readers are left alone while numbers move.
 */
import { bytesText, count, durationText, MISSING, percent, rate } from "./format.js";
import { LIMITS, levelAbove } from "./limits.js";
import { element, mark, part, write } from "./markup.js";
import { collecting } from "./tiles.js";

const ENDPOINTS_SHOWN = 10;

/** A table body whose rows follow a list of things. */
export class Rows {
  #body;
  #build;
  #rows = new Map();

  /**
   * @param {HTMLTableSectionElement} body
   * @param {() => {root: HTMLTableRowElement, show: (thing: object) => void}} build makes an empty row
   */
  constructor(body, build) {
    this.#body = body;
    this.#build = build;
  }

  /** Shows these things in this order. */
  show(things, keyOf) {
    const keys = new Set(things.map(keyOf));
    for (const [key, row] of this.#rows) {
      if (keys.has(key)) continue;
      row.root.remove();
      this.#rows.delete(key);
    }
    things.forEach((thing, index) => {
      const key = keyOf(thing);
      const row = this.#rows.get(key) ?? this.#build();
      this.#rows.set(key, row);
      row.show(thing);
      const place = this.#body.children[index] ?? null;
      if (place !== row.root) this.#body.insertBefore(row.root, place);
    });
  }
}

/** The endpoints of a snapshot, the costliest first. */
export class Endpoints {
  #rows = new Rows(part("endpoints").tBodies[0], endpointRow);
  #all = false;
  #endpoints = [];

  constructor() {
    part("endpoints-more").addEventListener("click", () => {
      this.#all = !this.#all;
      this.#draw();
    });
  }

  show(snapshot) {
    this.#endpoints = snapshot?.endpoints ?? [];
    const empty = snapshot === null ? "Collecting…" : `No requests in the last ${count(snapshot.interval_s)} s.`;
    write(part("endpoints-empty"), empty);
    this.#draw();
  }

  #draw() {
    const total_s = this.#endpoints.reduce((sum, endpoint) => sum + endpoint.total_s, 0);
    const costliestFirst = [...this.#endpoints].sort((a, b) => b.total_s - a.total_s);
    const shown = this.#all ? costliestFirst : costliestFirst.slice(0, ENDPOINTS_SHOWN);
    const things = shown.map((endpoint) => ({ endpoint, share: total_s === 0 ? 0 : endpoint.total_s / total_s }));
    this.#rows.show(things, ({ endpoint }) => `${endpoint.method} ${endpoint.route}`);
    part("endpoints").hidden = shown.length === 0;
    part("endpoints-empty").hidden = shown.length > 0;
    const more = part("endpoints-more");
    more.hidden = this.#endpoints.length <= ENDPOINTS_SHOWN;
    mark(more, "aria-expanded", String(this.#all));
    write(more, this.#all ? `Show the first ${ENDPOINTS_SHOWN}` : `Show all ${count(this.#endpoints.length)}`);
  }
}

function endpointRow() {
  const method = element("span", { class: "method" });
  const route = element("span", { class: "route" });
  const share = element("span", { class: "share-text" });
  const bar = element("span", { class: "share-bar", "aria-hidden": "true" });
  const [requests, p50, p95, p99, errors] = ["Requests/s", "p50", "p95", "p99", "Errors/s"].map(numberCell);
  const root = element("tr", {}, element("th", { scope: "row" }, method, " ", route),
    element("td", { class: "share", "data-label": "Share of time" }, bar, share), requests, p50, p95, p99, errors);
  return {
    root,
    show({ endpoint, share: value }) {
      write(method, endpoint.method);
      write(route, endpoint.route);
      write(share, `${percent(value * 100)} %`);
      bar.style.setProperty("--share", String(value));
      write(requests, rate(endpoint.requests_per_s));
      quantileCell(p50, "p50", endpoint.latency);
      quantileCell(p95, "p95", endpoint.latency);
      quantileCell(p99, "p99", endpoint.latency);
      write(errors, rate(endpoint.errors_per_s));
      const failing = endpoint.requests_per_s === 0 ? null : endpoint.errors_per_s / endpoint.requests_per_s;
      const reason = `more than ${LIMITS.error_rate.warning * 100} % of its requests`;
      flag(errors, levelAbove(failing, LIMITS.error_rate), reason);
    },
  };
}

function quantileCell(cell, name, latency) {
  const value = latency[`${name}_ms`];
  const limit = LIMITS[`${name}_ms`];
  write(cell, durationText(value));
  flag(cell, levelAbove(value, limit), `over the limit of ${limit.warning} ms`);
  if (value === null) mark(cell, "title", collecting(name, latency));
}

/** A cell for a number, which says its column's name itself where the table folds into blocks. */
export function numberCell(label) {
  return element("td", { class: "number", "data-label": label });
}

/** Marks a cell that is not good, and says why when pointed at. */
export function flag(cell, level, reason) {
  const bad = level === "warning" || level === "critical";
  mark(cell, "data-level", bad ? level : null);
  mark(cell, "title", bad ? reason : null);
}

/** The serving processes of a snapshot. */
export class Workers {
  #rows = new Rows(part("workers").tBodies[0], workerRow);

  show(snapshot) {
    const workers = snapshot?.workers ?? [];
    this.#rows.show(workers, (worker) => `${worker.slot} ${worker.pid}`);
    part("workers").hidden = workers.length === 0;
    part("workers-empty").hidden = workers.length > 0;
    write(part("workers-empty"), snapshot === null ? "Collecting…" : "No worker has reported.");
    write(part("workers-note"), workers.length === 0 ? "" : `${count(workers.length)} serving`);
  }
}

function workerRow() {
  const pid = element("th", { scope: "row", class: "number" });
  const [requests, cpu, memory, lag] = ["Requests/s", "CPU", "Memory", "Loop lag"].map(numberCell);
  return {
    root: element("tr", {}, pid, requests, cpu, memory, lag),
    show(worker) {
      write(pid, String(worker.pid));
      write(requests, rate(worker.requests_per_s));
      write(cpu, worker.cpu_percent === null ? MISSING : `${percent(worker.cpu_percent)} %`);
      write(memory, bytesText(worker.memory_bytes));
      write(lag, durationText(worker.loop_lag_ms));
      const reason = `the event loop woke more than ${LIMITS.loop_lag_ms.warning} ms late`;
      flag(lag, levelAbove(worker.loop_lag_ms, LIMITS.loop_lag_ms), reason);
    },
  };
}
