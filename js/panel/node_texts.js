/** What nodes say about the workers stays on them: newer front ends take a node's text off when its prompt ends. */

import { app, onEvent, showNodeText } from "../comfy.js";

const ENDS = ["execution_success", "execution_error", "execution_interrupted"];

export function keepNodeTexts() {
  const texts = new Map(); // of the prompt that runs: node id → the node and its text
  onEvent("execution_start", () => texts.clear());
  onEvent("sequence_parallel.text", ({ node: id, text }) => {
    const node = nodeOf(id);
    if (node) texts.set(id, { node, text });
  });
  for (const end of ENDS) onEvent(end, () => setTimeout(() => restore(texts))); // after the front end's own listeners
}

function restore(texts) {
  for (const [id, { node, text }] of texts) if (nodeOf(id) === node) showNodeText(id, text); // not in another workflow
  texts.clear();
}

function nodeOf(id) {
  return app.graph?.getNodeById(id) ?? null;
}
