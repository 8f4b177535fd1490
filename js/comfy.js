/** All that this pack takes from ComfyUI's front end, in one place. */

import { api } from "../../scripts/api.js";
import { app } from "../../scripts/app.js";

export { app };

/** Calls `handler(data)` for every event of this name that the server sends. */
export function onEvent(name, handler) {
  api.addEventListener(name, ({ detail }) => handler(detail));
}

/** What the server knows this page's WebSocket by. */
export function clientId() {
  return api.clientId ?? window.name;
}

/**
 * Asks a route of this pack, or of ComfyUI.
 * @param {string} path e.g. "/sequence_parallel/status"
 * @param {object} [body] sent as JSON with POST; without it the request is a GET
 * @returns {Promise<object>} the answer
 * @throws {Error} with the server's reason
 */
export async function request(path, body) {
  const post = {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify(body),
  };
  const response = await api.fetchApi(path, body === undefined ? {} : post);
  const answer = await response.json().catch(() => ({}));
  if (!response.ok) throw new Error(answer.error ?? `${response.status} ${response.statusText}`);
  return answer;
}

/** Shows a message for `seconds`. @param {"success"|"info"|"warn"|"error"} severity */
export function toast(severity, summary, detail, seconds) {
  app.extensionManager.toast.add({ severity, summary, detail, life: seconds * 1000 });
}

/** Shows a text on a node, as the server does with `send_progress_text`. */
export function showNodeText(nodeId, text) {
  api.dispatchCustomEvent("progress_text", { nodeId, text });
}

export function setting(id) {
  return app.extensionManager.setting.get(id);
}

/** @returns {Promise<boolean>} whether the user agrees */
export async function confirmed(title, message) {
  return (await app.extensionManager.dialog.confirm({ title, message })) === true;
}
