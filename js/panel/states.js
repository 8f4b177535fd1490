/** The server's words for what workers do, as text. */

import { t } from "./text.js";

const TEXTS = {
  starting: "Starting",
  ready: "Started",
  idle: "Idle",
  load: "Reading weights",
  weights: "Applying LoRAs",
  step: "Computing",
  waiting: "Waiting",
  sample: "Sampling",
  sampling: "Sampling",
  "load vae": "Reading the VAE",
  "begin tiles": "Computing tiles",
  tile: "Computing tiles",
  unload: "Freeing memory",
  "unload vae": "Freeing memory",
  recover: "Freeing memory",
  dead: "Failed",
  stopped: "Stopped",
};

export function stateText(state) {
  return t(TEXTS[state] ?? "Working");
}
