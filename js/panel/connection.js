/** Keeps a panel up to date while it can be seen, and asks for nothing while it cannot. */

import { clientId, onEvent, request } from "../comfy.js";

const REPEAT_MS = 5000; // the server forgets a panel 15 s after it last heard of it

export class Connection {
  /** @param {import("./panel.js").Panel} panel */
  constructor(panel) {
    this._panel = panel;
    this._inView = false;
    this._timer = null;
    this.onShown = () => {};
    onEvent("sequence_parallel.status", (state) => this._timer && panel.update(state));
    onEvent("reconnected", () => this._timer && this._tell(true));
    document.addEventListener("visibilitychange", () => this._apply());
    // Also tells when the sidebar shows another tab in the panel's place.
    this._observer = new IntersectionObserver((entries) => {
      this._inView = entries.at(-1).isIntersecting;
      this._apply();
    });
    this._observer.observe(panel.element);
  }

  _apply() {
    const visible = this._inView && document.visibilityState === "visible";
    if (visible === (this._timer !== null)) return;
    if (visible) {
      this._timer = setInterval(() => this._tell(true), REPEAT_MS);
      this.onShown();
    } else {
      clearInterval(this._timer);
      this._timer = null;
    }
    this._tell(visible);
  }

  async _tell(visible) {
    try {
      const state = await request("/sequence_parallel/watch", { client: clientId(), visible });
      if (visible && this._timer) this._panel.update(state);
    } catch (error) {
      if (this._timer) this._panel.fail(error);
    }
  }
}
