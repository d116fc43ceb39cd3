/**
 * What the page says of its own connection. Pure: states and seconds in, words out.
 */
import { age, timeOfDay } from "./format.js";

/**
 * @param {object} view
 * @param {import("./stream.js").StreamState} view.stream
 * @param {boolean} view.stale whether the server says that its monitor is silent
 * @param {boolean} view.paused
 * @returns {{state: string, text: string}} for the small sign in the bar; it changes with the state only, never with
 *   the seconds, because screen readers read it aloud
 */
export function sign({ stream, stale, paused }) {
  if (stream.name === "refused") return { state: "lost", text: "Token needed" };
  if (stream.name === "lost") return { state: "lost", text: "Stream lost" };
  if (stream.name === "connecting") return { state: "connecting", text: "Connecting…" };
  if (stream.name === "off") return { state: "off", text: "Off while hidden" };
  if (stale) return { state: "stale", text: "Monitor silent" };
  return paused ? { state: "paused", text: "Paused" } : { state: "live", text: "Live" };
}

/**
 * The line above everything, or null when there is nothing to excuse.
 * @param {object} view
 * @param {import("./stream.js").StreamState} view.stream
 * @param {boolean} view.stale
 * @param {number|null} view.age_s age of what is shown, null when nothing is
 * @param {number|null} view.pausedAt wall-clock second of what is shown while paused
 * @param {number} view.now on the clock of performance.now()
 */
export function notice({ stream, stale, age_s, pausedAt, now }) {
  if (stream.name === "lost") {
    const wait = Math.max(0, Math.ceil((stream.retryAt - now) / 1000));
    return `Stream lost, retrying in ${wait} s – ${dataAge(age_s)}`;
  }
  if (stream.name === "connecting" && age_s !== null) return `Reconnecting – ${dataAge(age_s)}`;
  if (stale && age_s === null) return "The monitor has not reported yet. Numbers appear with its first report.";
  if (stale) return `The monitor is silent – ${dataAge(age_s)}`;
  if (pausedAt === null) return null;
  return `Paused at ${timeOfDay(pausedAt, { seconds: "always" })}. What comes in meanwhile is kept.`;
}

function dataAge(age_s) {
  return age_s === null ? "no data yet" : `data is ${age(age_s)} old`;
}
