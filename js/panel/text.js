/** Text for people: translations, numbers with units. */

import { request, setting } from "../comfy.js";

let translations = {};

/** Fetches the translations of ComfyUI's language; English needs none. To be awaited before the first `t`. */
export async function loadTranslations() {
  const locale = setting("Comfy.Locale") ?? "en";
  if (locale === "en") return;
  const all = await request("/i18n").catch(() => ({}));
  translations = all[locale]?.sequenceParallel ?? {};
}

/** The text in ComfyUI's language, with the values put in for {names}. @param {string} english also the key */
export function t(english, values = {}) {
  const text = translations[english] ?? english;
  return text.replace(/\{(\w+)\}/g, (whole, name) => values[name] ?? whole);
}

/** 1610612736 → "1.5 GiB" */
export function bytes(count) {
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  const power = Math.min(units.length - 1, Math.max(0, Math.floor(Math.log2(Math.max(1, count)) / 10)));
  const value = count / 1024 ** power;
  return `${value.toFixed(power === 0 || value >= 100 ? 0 : 1)} ${units[power]}`;
}

/** 0.0123 → "12 ms" */
export function seconds(value) {
  return value < 1 ? `${(value * 1000).toFixed(0)} ms` : `${value.toFixed(2)} s`;
}
