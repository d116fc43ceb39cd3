/**
 * The dashboard: one state, one `draw`. Everything else is given what it needs from here.
 */
import { Access } from "./access.js";
import { Agents } from "./agents.js";
import { Api, Lost, Refused, Unauthorized } from "./api.js";
import { Charts } from "./charts.js";
import { notice, sign } from "./connection.js";
import { count } from "./format.js";
import { health } from "./health.js";
import { History } from "./history.js";
import { mark, part, write } from "./markup.js";
import { pointOf } from "./measures.js";
import { Stream } from "./stream.js";
import { Endpoints, Workers } from "./tables.js";
import { Tiles } from "./tiles.js";

const SECOND_MS = 1_000;

class Dashboard {
  #api = new Api({ base: new URL("../../api/v1/", import.meta.url), storage: sessionStorage });
  #access = new Access({ onToken: (token) => this.#enter(token) });
  #agents = new Agents({ api: this.#api, onUnauthorized: () => this.#refuse() });
  #stream = new Stream({
    api: this.#api,
    path: "system/live",
    onEvent: (event) => this.#hear(event),
    onState: (state) => this.#follow(state),
  });
  #tiles = new Tiles(part("overview"));
  #charts = new Charts(part("charts"));
  #endpoints = new Endpoints();
  #workers = new Workers();

  #history = new History();
  #streamState = { name: "connecting" };
  #snapshot = null;
  /** How old the snapshot was when it was heard, and when that was: server and browser may disagree on the time. */
  #heard = { age_s: 0, at: 0 };
  #stale = false;
  #range_s = 300;
  /** What the page showed when it was paused, or null. */
  #frozen = null;
  #drawing = false;

  start() {
    part("ranges").addEventListener("change", (event) => this.#choose(Number(event.target.value)));
    part("pause").addEventListener("click", () => this.#togglePause());
    part("retry").addEventListener("click", () => this.#stream.retryNow());
    document.addEventListener("visibilitychange", () => this.#attend());
    setInterval(() => this.#drawSoon(), SECOND_MS);
    this.#attend();
    this.#draw();
  }

  /** Reads while someone looks, and only then. */
  #attend() {
    if (document.hidden) {
      this.#stream.stop();
      this.#agents.stop();
    } else {
      this.#stream.start();
      this.#agents.start();
    }
  }

  #hear({ event, data }) {
    const fact = JSON.parse(data);
    if (event === "stale") {
      this.#stale = true;
      if (fact.age_s !== null) this.#heard = { age_s: fact.age_s, at: performance.now() };
    } else if (event === "snapshot") {
      this.#stale = false;
      this.#snapshot = fact;
      this.#heard = { age_s: 0, at: performance.now() };
      this.#history.append(pointOf(fact));
    }
    this.#drawSoon();
  }

  #follow(state) {
    if (state.name === "refused") {
      this.#refuse();
      return;
    }
    this.#streamState = state;
    if (state.name === "live") {
      this.#access.hide();
      this.#recall();
      this.#agents.start();
    }
    this.#drawSoon();
  }

  /** Fetches the past: at the start, and after each loss, because the server kept what we missed. */
  async #recall() {
    try {
      const { points } = await this.#api.read("system/history");
      this.#history.replace(points);
    } catch (error) {
      if (error instanceof Unauthorized) this.#refuse();
      // Without its past the page is poorer, not wrong: the charts begin now.
      else if (!(error instanceof Refused) && !(error instanceof Lost)) reportError(error);
    }
    this.#drawSoon();
  }

  /** Asks for a token once, however many answers say that it is missing. */
  #refuse() {
    if (this.#streamState.name === "refused") return;
    this.#stream.stop();
    this.#agents.stop();
    this.#streamState = { name: "refused" };
    this.#access.ask({ refused: this.#api.hasToken });
    this.#api.useToken(null);
    this.#drawSoon();
  }

  #enter(token) {
    this.#api.useToken(token);
    this.#stream.start();
  }

  #choose(range_s) {
    this.#range_s = range_s;
    this.#draw();
  }

  #togglePause() {
    this.#frozen = this.#frozen === null ? this.#view() : null;
    mark(part("pause"), "aria-pressed", String(this.#frozen !== null));
    write(part("pause"), this.#frozen === null ? "Pause" : "Resume");
    this.#draw();
  }

  /** What can be frozen: the newest snapshot, and how long the history was then. */
  #view() {
    return { snapshot: this.#snapshot, to: this.#history.newestAt };
  }

  #drawSoon() {
    if (this.#drawing) return;
    this.#drawing = true;
    requestAnimationFrame(() => {
      this.#drawing = false;
      this.#draw();
    });
  }

  #draw() {
    const { snapshot, to } = this.#frozen ?? this.#view();
    const old = this.#snapshot !== null && (this.#stale || this.#streamState.name !== "live");
    this.#drawConnection(old);
    this.#drawHealth(snapshot, old);
    this.#tiles.show(snapshot);
    this.#endpoints.show(snapshot);
    this.#workers.show(snapshot);
    const end = to ?? Date.now() / 1000;
    this.#charts.show(this.#history.columns(this.#range_s, to), { from: end - this.#range_s, to: end },
      snapshot?.host.memory_bytes_max ?? null);
  }

  #drawConnection(old) {
    const now = performance.now();
    const age_s = this.#snapshot === null ? null : this.#heard.age_s + (now - this.#heard.at) / 1000;
    const stream = this.#streamState;
    const view = { stream, stale: this.#stale, age_s, now, paused: this.#frozen !== null };
    const { state, text } = sign(view);
    mark(part("connection"), "data-state", state);
    write(part("connection-text"), text);
    const words = notice({ ...view, pausedAt: this.#frozen?.to ?? null });
    part("notice").hidden = words === null;
    mark(part("notice"), "data-state", state);
    write(part("notice-text"), words ?? "");
    mark(part("notice"), "title", stream.name === "lost" ? stream.reason : null);
    part("retry").hidden = stream.name !== "lost";
    mark(part("content"), "data-old", old ? "" : null);
  }

  #drawHealth(snapshot, old) {
    const { level, word, detail } = this.#judge(snapshot, old);
    mark(part("health"), "data-level", level);
    write(part("health-word"), word);
    write(part("health-detail"), detail);
    document.title = `${word.replace("…", "")} · headrace`;
    write(part("health-span"), snapshot === null ? "" : `over the last ${count(snapshot.interval_s)} s`);
  }

  #judge(snapshot, old) {
    if (snapshot === null) return { level: "unknown", word: "Collecting…", detail: "Waiting for the first numbers." };
    if (old) return { level: "unknown", word: "Unknown", detail: "These are the last numbers that arrived." };
    return health(snapshot);
  }
}

new Dashboard().start();
