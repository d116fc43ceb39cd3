/**
 * The figures on top. What each says is decided by pure functions of a snapshot; `Tiles` only puts it on the page.
 */
import { bytes, bytesText, count, duration, MISSING, percent, rate } from "./format.js";
import { LIMITS, levelAbove } from "./limits.js";
import { element, mark, write } from "./markup.js";
import { hitRate, memoryShare } from "./measures.js";

/**
 * @typedef {object} Face
 * @property {string} text the figure
 * @property {string} unit
 * @property {string} note what stands below it
 * @property {"good"|"warning"|"critical"|"unknown"} level
 * @property {string} [word] the level in a word, when the usual one does not fit
 * @property {{share: number, limit: number|null}} [meter] 0 to 1 each
 */

/** @type {Face} */
const NOTHING_YET = { text: MISSING, unit: "", note: "Collecting…", level: "unknown" };

/** Name, label and face of every tile, in reading order. */
export const TILES = [
  { name: "requests", label: "Requests", face: requests },
  { name: "p50", label: "Response p50", face: (snapshot) => quantile(snapshot, "p50") },
  { name: "p95", label: "Response p95", face: (snapshot) => quantile(snapshot, "p95") },
  { name: "p99", label: "Response p99", face: (snapshot) => quantile(snapshot, "p99") },
  { name: "errors", label: "Error rate", face: errors },
  { name: "hits", label: "Cache hit rate", face: hits },
  { name: "executions", label: "Agent executions", face: executions },
  { name: "cpu", label: "CPU", face: cpu },
  { name: "memory", label: "Memory", face: memory },
];

/** "Collecting… p99 after 1 000 requests (now 212)", or null when there are enough. */
export function collecting(name, latency) {
  const needed = LIMITS[`${name}_ms`].samples;
  if (latency.count >= needed) return null;
  return `Collecting… ${name} after ${count(needed)} requests (now ${count(latency.count)})`;
}

function requests(snapshot) {
  const note = `${count(snapshot.connections)} in flight`;
  return { text: rate(snapshot.requests_per_s), unit: "/s", note, level: "good" };
}

function quantile(snapshot, name) {
  const value = snapshot.latency[`${name}_ms`];
  const limit = LIMITS[`${name}_ms`];
  if (value === null) {
    return { text: MISSING, unit: "", note: collecting(name, snapshot.latency) ?? "no data", level: "unknown" };
  }
  const level = levelAbove(value, limit);
  const meter = { share: value / limit.warning, limit: null };
  return { ...duration(value), note: `limit ${limit.warning} ms`, level, meter };
}

function errors(snapshot) {
  const share = snapshot.error_rate;
  if (share === null) return { text: MISSING, unit: "", note: "no requests to judge by", level: "unknown" };
  const level = levelAbove(share, LIMITS.error_rate);
  const meter = { share: share / LIMITS.error_rate.warning, limit: null };
  return { text: percent(share * 100), unit: "%", note: `${rate(snapshot.errors_per_s)} errors/s`, level, meter };
}

function hits(snapshot) {
  const { rate: share, lookups_per_s: lookups } = hitRate(snapshot.tiers);
  if (share === null) {
    const note = snapshot.tiers.length === 0 ? "no cache in use" : "no lookups to judge by";
    return { text: MISSING, unit: "", note, level: "unknown" };
  }
  const enough = lookups * snapshot.interval_s >= LIMITS.hit_rate.lookups;
  const level = enough && share < LIMITS.hit_rate.warning ? "warning" : "good";
  const meter = { share, limit: LIMITS.hit_rate.warning };
  return { text: percent(share * 100), unit: "%", note: `of ${rate(lookups)} lookups/s`, level, word: "low", meter };
}

function executions({ agents }) {
  const lost = agents.failed_per_s + agents.timeouts_per_s;
  const note = `${rate(agents.started_per_s)}/s started · ${lost === 0 ? "none" : `${rate(lost)}/s`} failing`;
  return { text: count(agents.running), unit: "running", note, level: "good" };
}

function cpu({ host }) {
  if (host.cpu_percent === null) return { text: MISSING, unit: "", note: "not reported", level: "unknown" };
  const meter = { share: host.cpu_percent / 100, limit: LIMITS.cpu_percent.warning / 100 };
  const level = levelAbove(host.cpu_percent, LIMITS.cpu_percent);
  return { text: percent(host.cpu_percent), unit: "%", note: `of ${grammar(host.cpus, "CPU")}`, level, meter };
}

function memory({ host }) {
  if (host.memory_bytes === null) return { text: MISSING, unit: "", note: "not reported", level: "unknown" };
  const share = memoryShare(host);
  if (share === null) return { ...bytes(host.memory_bytes), note: "no limit known", level: "good" };
  const meter = { share, limit: LIMITS.memory_share.warning };
  const note = `${percent(share * 100)} % of ${bytesText(host.memory_bytes_max)}`;
  return { ...bytes(host.memory_bytes), note, level: levelAbove(share, LIMITS.memory_share), meter };
}

function grammar(number, noun) {
  return `${Number.isInteger(number) ? count(number) : rate(number)} ${noun}${number === 1 ? "" : "s"}`;
}

const LEVEL_WORDS = { warning: "high", critical: "critical" };

/** Puts the faces into a section of the page. */
export class Tiles {
  #tiles;

  /** @param {HTMLElement} section */
  constructor(section) {
    this.#tiles = TILES.map((tile) => ({ ...tile, nodes: build(tile) }));
    section.replaceChildren(...this.#tiles.map((tile) => tile.nodes.root));
  }

  /** Shows a snapshot; null shows that there is none yet. */
  show(snapshot) {
    for (const { face, nodes } of this.#tiles) draw(nodes, snapshot === null ? NOTHING_YET : face(snapshot));
  }
}

function build({ name, label }) {
  const text = element("span", { class: "tile-text" });
  const unit = element("span", { class: "tile-unit" });
  const word = element("span", { class: "tile-word" });
  const note = element("span");
  const meter = element("div", { class: "meter", "aria-hidden": "true" });
  const root = element("div", { class: "tile", "data-tile": name },
    element("h2", { class: "tile-label" }, label), element("p", { class: "tile-figure" }, text, " ", unit), meter,
    element("p", { class: "tile-note" }, word, note));
  return { root, text, unit, word, note, meter };
}

function draw(nodes, face) {
  write(nodes.text, face.text);
  write(nodes.unit, face.unit);
  const word = face.level in LEVEL_WORDS ? face.word ?? LEVEL_WORDS[face.level] : "";
  write(nodes.word, word);
  write(nodes.note, word === "" ? face.note : ` · ${face.note}`);
  mark(nodes.root, "data-level", face.level);
  mark(nodes.meter, "data-empty", face.meter === undefined ? "" : null);
  nodes.meter.style.setProperty("--share", String(Math.min(1, face.meter?.share ?? 0)));
  const limit = face.meter?.limit ?? null;
  mark(nodes.meter, "data-limit", limit === null ? null : String(limit));
  if (limit !== null) nodes.meter.style.setProperty("--limit", String(limit));
}
