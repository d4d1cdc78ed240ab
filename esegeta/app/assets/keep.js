// The last step: the configuration as it is kept, to take along.
import * as api from "./api.js";
import { $, button, el, say } from "./dom.js";
import { load, on, saved, store } from "./store.js";

const FORMS = [["toml", "TOML"], ["python", "Python script"], ["command", "command"], ["cluster", "on a cluster"]];
let how = "toml";

async function show() {
  try {
    await saved();
    $("kept").textContent = await api.text(`api/keep/${how}`);
  } catch (error) { say(error.message, true); }
  for (const one of document.querySelectorAll("[data-how]")) one.setAttribute("aria-pressed", String(one.dataset.how === how));
  $("download").href = `api/keep/${how}?download=1`;
}

async function take(file) {
  try {
    await api.sendText("api/state/text", await file.text());
    await load();
    say(`${file.name} is what the page shows now.`);
    show();
  } catch (error) { say(error.message, true); }
}

export function draw() {
  const chooser = el("input", { type: "file", id: "load", accept: ".toml,.json", "aria-label": "Load a configuration" });
  chooser.addEventListener("change", () => { if (chooser.files[0]) take(chooser.files[0]); });
  $("keep").replaceChildren(el("div", { class: "card" },
    el("h2", {}, "The configuration"),
    el("p", {}, `What you see is ${store.about.file} in ${store.about.folder}. Results are in ${store.about.results}.`),
    el("p", { class: "row" }, FORMS.map(([key, text]) => button(text, () => { how = key; show(); }, { data: { how: key }, "aria-pressed": "false" }))),
    el("p", { class: "row" }, button("Copy", async () => { await navigator.clipboard.writeText($("kept").textContent); say("It is copied."); }, { id: "copy" }),
      el("a", { id: "download", download: true, href: "api/keep/toml?download=1" }, "Download"), store.about.finished ? null : el("label", {}, "Load ", chooser)),
    el("pre", { id: "kept", tabindex: "0" })));
  if (!$("keep").hidden) show();
}

export { show };
on("replaced", draw);
