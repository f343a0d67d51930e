// The extension's own words, from locales/*/main.json, in the language that the canvas is set to.
import { api } from "../../../scripts/api.js";
import { app } from "../../../scripts/app.js";

let languages = {};

export async function loadWords() {
  try {
    const reply = await api.fetchApi("/i18n");
    languages = await reply.json();
  } catch {
    languages = {}; // keys are shown then
  }
}

const language = () => app.extensionManager.setting.get("Comfy.Locale") ?? "en";

/** What a file of locales/ has in the canvas's language, or in English. */
function find(...path) {
  const names = [language(), language().split("-")[0], "en"];
  const found = names.map((name) => path.reduce((words, key) => words?.[key], languages[name]));
  return found.find((words) => words !== undefined);
}

/** The names and tooltips of a node; undefined if it is not Ark's. */
export const wordsOf = (node) => (node?.startsWith("Ark") ? find("nodeDefs", node) : undefined);

/** The language's words for a key, `{name}` in them replaced by what is given. */
export function say(key, given = {}) {
  return (find("ark", key) ?? key).replace(/\{(\w+)\}/g, (whole, name) => given[name] ?? whole);
}

/** The time of day, in the language's own writing. */
export const clock = (seconds) => new Date(seconds * 1000).toLocaleTimeString(language());

/** A number with three significant digits, in the language's own writing. */
export const figure = (value) => new Intl.NumberFormat(language(), { maximumSignificantDigits: 3 }).format(value);
