/** Toasts for what happens to the workers, and a badge that stays until someone has looked. */

import { app, onEvent, toast } from "../comfy.js";
import { t } from "./text.js";

export const TAB_ID = "sequence-parallel";

const TOASTS = {
  started: ["success", "Workers started", 4],
  left: ["info", "Workers have exited", 6],
  crashed: ["error", "Workers failed", 20],
  out_of_memory: ["error", "Out of memory in a worker", 20],
  not_finite: ["warn", "Values that are not finite", 20],
  retried: ["warn", "Run again on fresh workers", 10],
  fallback: ["warn", "Not run in parallel", 10],
};

/** What the topbar is to show, for `registerExtension`; follows `setBadge`. */
export function topbarBadges() {
  if (!tab()?.iconBadge) return [];
  const tooltip = t("Open SP workers in the sidebar.");
  return [{ text: t("Workers failed"), label: "SP", variant: "error", tooltip }];
}

/** ComfyUI's own copy of the tab: changing it is what redraws the sidebar and the topbar. */
function tab() {
  return app.extensionManager?.getSidebarTabs?.().find(({ id }) => id === TAB_ID);
}

export function setBadge(shown) {
  const registered = tab();
  if (registered) registered.iconBadge = shown ? "!" : "";
}

/**
 * Listens from now on: ComfyUI's front end complains about events that nobody listens to.
 * @param {Promise<void>} ready what happens before is shown then
 */
export function watchTrouble(ready) {
  const fallbacks = new Set();
  onEvent("sequence_parallel.event", async ({ kind, text }) => {
    await ready;
    if (kind === "fallback") {
      if (fallbacks.has(text)) return; // once is enough; the node says it every time
      fallbacks.add(text);
    }
    const [severity, summary, life] = TOASTS[kind] ?? ["info", "Sequence Parallel", 6];
    toast(severity, t(summary), text, life);
    if (severity === "error") setBadge(true);
    if (kind === "started") setBadge(false);
  });
}
