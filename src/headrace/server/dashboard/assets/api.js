/**
 * The way to the server. Everything is read with fetch, because only fetch can carry the token in a header.
 */

const TOKEN = "headrace.token";
const ANSWER_MS_MAX = 10_000;

/** The server wants a token, or another one. */
export class Unauthorized extends Error {}

/** The server answered, with a refusal. `status` is its HTTP status, `retry_s` what Retry-After says, or null. */
export class Refused extends Error {
  constructor(status, detail, retry_s) {
    super(detail);
    this.status = status;
    this.retry_s = retry_s;
  }
}

/** There is no answer, or not all of it: no network, no server, or we gave up waiting. */
export class Lost extends Error {}

/** Waits for the transport; whatever it fails with is a `Lost`, so that a mistake of ours is never taken for one. */
export async function carried(transfer) {
  try {
    return await transfer;
  } catch (cause) {
    throw new Lost("no connection to the server", { cause });
  }
}

export class Api {
  #base;
  #storage;

  /** @param {{base: URL, storage: Storage}} options where /api/v1/ is, and what keeps the token for this tab */
  constructor({ base, storage }) {
    this.#base = base;
    this.#storage = storage;
  }

  get hasToken() {
    return this.#storage.getItem(TOKEN) !== null;
  }

  /** Keeps the token until the tab closes; null forgets it. */
  useToken(token) {
    if (token === null) this.#storage.removeItem(TOKEN);
    else this.#storage.setItem(TOKEN, token);
  }

  /**
   * An answer of 200 to 299; anything else becomes `Unauthorized`, `Refused` or `Lost`. A refusal that comes when we
   * have another token already says nothing of that one: the question is asked again.
   */
  async open(path, { signal, accept = "application/json" }) {
    const headers = { Accept: accept };
    const token = this.#storage.getItem(TOKEN);
    if (token !== null) headers.Authorization = `Bearer ${token}`;
    const answer = await carried(fetch(new URL(path, this.#base), { headers, signal, cache: "no-store" }));
    if (answer.ok) return answer;
    await carried(answer.body?.cancel());
    if (answer.status === 401) {
      if (token !== this.#storage.getItem(TOKEN)) return this.open(path, { signal, accept });
      throw new Unauthorized(path);
    }
    const seconds = Number.parseInt(answer.headers.get("Retry-After") ?? "", 10);
    throw new Refused(answer.status, `the server answered ${answer.status}`, Number.isNaN(seconds) ? null : seconds);
  }

  /** The JSON at `path`, within ten seconds. */
  async read(path) {
    const answer = await this.open(path, { signal: AbortSignal.timeout(ANSWER_MS_MAX) });
    return JSON.parse(await carried(answer.text()));
  }
}
