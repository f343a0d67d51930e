// The extension's own words, from locales/*/main.json, in the language that the canvas is set to.
import { api } from "../../../scripts/api.js";
import { app } from "../../../scripts/app.js";

let languages = {};

export async function loadWords() {
  try {
    const reply = await api.fetchApi("/i18n");
    const found = await reply.json();
    languages = Object.fromEntries(Object.entries(found).map(([name, words]) => [name, words.ark ?? {}]));
  } catch {
    languages = {}; // keys are shown then
  }
}

/** The language's words for a key, `{name}` in them replaced by what is given. */
export function say(key, given = {}) {
  const language = app.extensionManager.setting.get("Comfy.Locale") ?? "en";
  const words = languages[language]?.[key] ?? languages[language.split("-")[0]]?.[key] ?? languages.en?.[key] ?? key;
  return words.replace(/\{(\w+)\}/g, (whole, name) => given[name] ?? whole);
}

/** A number with three significant digits, in the language's own writing. */
export function figure(value) {
  const language = app.extensionManager.setting.get("Comfy.Locale") ?? "en";
  return new Intl.NumberFormat(language, { maximumSignificantDigits: 3 }).format(value);
}
