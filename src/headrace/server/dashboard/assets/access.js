/**
 * The form that asks for the server's token, shown instead of the numbers while the server refuses us.
 */
import { part, write } from "./markup.js";

export class Access {
  #form = part("access");
  #input = part("access-token");

  /** @param {{onToken: (token: string) => void}} options */
  constructor({ onToken }) {
    this.#form.addEventListener("submit", (event) => {
      event.preventDefault();
      const token = this.#input.value.trim();
      this.#input.value = "";
      if (token !== "") onToken(token);
    });
  }

  /** Shows the form; `refused` says that a token was sent and not accepted. */
  ask({ refused }) {
    const message = part("access-refused");
    message.hidden = !refused;
    write(message, refused ? "The server did not accept that token." : "");
    part("content").hidden = true;
    part("controls").hidden = true;
    if (!this.#form.hidden) return;
    this.#form.hidden = false;
    this.#input.focus();
  }

  hide() {
    this.#form.hidden = true;
    part("content").hidden = false;
    part("controls").hidden = false;
  }
}
