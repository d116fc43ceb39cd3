/**
 * The live stream: connects, listens, and after a loss comes back with growing, jittered pauses.
 */
import { carried, Lost, Refused, Unauthorized } from "./api.js";
import { EventParser } from "./events.js";

const PAUSE_MS_MIN = 1_000;
const PAUSE_MS_MAX = 15_000;

/** The server sends something at least every 15 s; three times that is silence. */
const SILENCE_MS_MAX = 45_000;

/**
 * The pause before attempt `failures + 1`: doubles up to 15 s, and a random half of it is taken away, so that many
 * pages do not come back in step.
 */
export function pauseAfter(failures, { least_ms = PAUSE_MS_MIN, random = Math.random } = {}) {
  const longest = Math.min(PAUSE_MS_MAX, least_ms * 2 ** Math.min(failures - 1, 10));
  return longest * (0.5 + random() / 2);
}

/**
 * @typedef {{name: "connecting"|"live"|"refused"|"off"} | {name: "lost", retryAt: number, reason: string}} StreamState
 * `retryAt` is on the clock of performance.now().
 */
export class Stream {
  #api;
  #path;
  #onEvent;
  #onState;
  #controller = null;
  #wakeUp = () => undefined;

  /**
   * @param {object} options
   * @param {import("./api.js").Api} options.api
   * @param {string} options.path
   * @param {(event: {event: string, data: string}) => void} options.onEvent
   * @param {(state: StreamState) => void} options.onState
   */
  constructor({ api, path, onEvent, onState }) {
    this.#api = api;
    this.#path = path;
    this.#onEvent = onEvent;
    this.#onState = onState;
  }

  /** Connects, unless it does already. */
  start() {
    if (this.#controller !== null) return;
    this.#controller = new AbortController();
    this.#run(this.#controller.signal);
  }

  /** Disconnects and stays so until `start`. */
  stop() {
    this.#controller?.abort();
    this.#controller = null;
    this.#wakeUp();
    this.#onState({ name: "off" });
  }

  /** Ends a pause between attempts now. */
  retryNow() {
    this.#wakeUp();
  }

  async #run(signal) {
    let failures = 0;
    while (!signal.aborted) {
      this.#onState({ name: "connecting" });
      const end = await this.#listen(signal);
      if (signal.aborted) return;
      if (end.refused) {
        this.#controller = null;
        this.#onState({ name: "refused" });
        return;
      }
      failures = end.heard ? 1 : failures + 1;
      const wanted_ms = Math.min(end.wanted_ms, PAUSE_MS_MAX);
      const pause_ms = Math.max(pauseAfter(failures, { least_ms: end.least_ms }), wanted_ms);
      this.#onState({ name: "lost", retryAt: performance.now() + pause_ms, reason: end.reason });
      await this.#pause(pause_ms);
    }
  }

  /** One connection from beginning to end. */
  async #listen(signal) {
    const end = { heard: false, refused: false, reason: "the server closed it", least_ms: PAUSE_MS_MIN, wanted_ms: 0 };
    const attempt = new AbortController();
    const abort = () => attempt.abort();
    signal.addEventListener("abort", abort);
    let silence = setTimeout(abort, SILENCE_MS_MAX);
    try {
      const answer = await this.#api.open(this.#path, { signal: attempt.signal, accept: "text/event-stream" });
      const parser = new EventParser();
      const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
      for (let piece = await carried(reader.read()); !piece.done; piece = await carried(reader.read())) {
        clearTimeout(silence);
        silence = setTimeout(abort, SILENCE_MS_MAX);
        if (signal.aborted) return end;
        if (!end.heard) this.#onState({ name: "live" });
        end.heard = true;
        for (const event of parser.push(piece.value)) this.#onEvent(event);
        end.least_ms = parser.retry_ms ?? end.least_ms;
      }
    } catch (error) {
      if (error instanceof Unauthorized) end.refused = true;
      else if (error instanceof Refused) {
        end.reason = error.message;
        end.wanted_ms = (error.retry_s ?? 0) * 1000;
      } else if (error instanceof Lost) end.reason = error.message;
      else {
        // A mistake, ours or the server's, must not end the page: it is reported, and the next attempt may do better.
        end.reason = "an answer could not be read";
        reportError(error);
      }
    } finally {
      clearTimeout(silence);
      signal.removeEventListener("abort", abort);
    }
    return end;
  }

  #pause(milliseconds) {
    return new Promise((resolve) => {
      const timer = setTimeout(resolve, milliseconds);
      this.#wakeUp = () => {
        clearTimeout(timer);
        resolve();
      };
    });
  }
}
