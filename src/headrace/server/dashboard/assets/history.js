/**
 * The last hour, as columns for the charts. The step is the server's: within one step the newest snapshot stands for
 * it.
 */

const FIELDS = [
  "requests_per_s", "errors_per_s", "p50_ms", "p95_ms", "p99_ms", "hit_rate", "cpu_percent", "memory_bytes",
];

/** Two points further apart than this many steps have a gap between them, which is drawn as one. */
const GAP_STEPS = 2.5;

export class History {
  #points = [];
  #step_s;
  #span_s;

  /** @param {{step_s?: number, span_s?: number}} [options] width of a step and what is kept, in seconds */
  constructor({ step_s = 5, span_s = 3600 } = {}) {
    this.#step_s = step_s;
    this.#span_s = span_s;
  }

  /** Wall-clock second of the newest point, or null. */
  get newestAt() {
    return this.#points.at(-1)?.at ?? null;
  }

  get length() {
    return this.#points.length;
  }

  /** Takes the server's history for the past; keeps what arrived live after its end. */
  replace(points) {
    const past = [...points].sort((a, b) => a.at - b.at);
    const end = past.at(-1)?.at ?? -Infinity;
    this.#points = [...past, ...this.#points.filter((point) => point.at > end)];
    this.#forget();
  }

  /** Adds a point that is newer than all others; an older one is ignored. */
  append(point) {
    const newest = this.#points.at(-1);
    if (newest !== undefined && point.at <= newest.at) return;
    if (newest !== undefined && this.#stepOf(newest) === this.#stepOf(point)) this.#points.pop();
    this.#points.push(point);
    this.#forget();
  }

  /**
   * The points of the `range_s` seconds before `until` as uPlot wants them: one array a field. Nulls stay nulls, and
   * where points are missing a row of nulls keeps the line from being drawn across.
   * @returns {{at: number[]} & Object<string, (number|null)[]>}
   */
  columns(range_s, until = this.newestAt) {
    const columns = { at: [] };
    for (const field of FIELDS) columns[field] = [];
    const since = (until ?? 0) - range_s - this.#step_s;
    let previous = null;
    for (const point of this.#points) {
      if (point.at < since || point.at > until) continue;
      if (previous !== null && point.at - previous > GAP_STEPS * this.#step_s) {
        columns.at.push(previous + this.#step_s);
        for (const field of FIELDS) columns[field].push(null);
      }
      columns.at.push(point.at);
      for (const field of FIELDS) columns[field].push(point[field]);
      previous = point.at;
    }
    return columns;
  }

  #stepOf(point) {
    return Math.floor(point.at / this.#step_s);
  }

  #forget() {
    const since = (this.newestAt ?? 0) - this.#span_s;
    const first = this.#points.findIndex((point) => point.at >= since);
    if (first > 0) this.#points.splice(0, first);
  }
}
