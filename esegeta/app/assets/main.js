// The page: four steps, news from the server, keys.
import * as api from "./api.js";
import "./choose.js";
import { $, say } from "./dom.js";
import * as keep from "./keep.js";
import * as methods from "./methods.js";
import * as run from "./run.js";
import { heard, load, lookAtTrial, on, store } from "./store.js";

const STEPS = ["choose", "methods", "run", "keep"];

function go(step) {
  for (const one of STEPS) $(one).hidden = one !== step;
  for (const one of document.querySelectorAll("[data-step]")) {
    if (one.dataset.step === step) one.setAttribute("aria-current", "step"); else one.removeAttribute("aria-current");
  }
  history.replaceState(null, "", `#${step}`);
  if (step === "keep") keep.show();
  if (step === "methods") methods.chosen();
  document.documentElement.dataset.step = step;
}

function keys(event) {
  const typing = event.target.closest("input, select, textarea, dialog, canvas");
  if (typing || event.ctrlKey || event.metaKey || event.altKey) return;
  const number = STEPS[Number(event.key) - 1];
  if (number) go(number);
  else if (event.key === "/") { go("methods"); $("search").focus(); event.preventDefault(); }
  else if (event.key === "n" || event.key === "p") { go("run"); run.step(event.key === "n" ? 1 : -1); }
  else if (event.key === "r") { go("run"); run.start(); }
  else if (event.key === "?") $("help").showModal();
}

function listen() {
  const source = new EventSource("api/events");
  source.onmessage = (message) => {
    const news = JSON.parse(message.data);
    if (news.mark) heard(news.mark);
    run.heard(news);
  };
  source.onopen = () => { if (document.documentElement.dataset.server === "gone") { say("The server is there again."); load(); } document.documentElement.dataset.server = "here"; };
  source.onerror = () => {
    document.documentElement.dataset.server = "gone";
    say("The server does not answer. What runs goes on; this page waits for it.", true);
    if (source.readyState === EventSource.CLOSED) setTimeout(listen, 2000);
  };
}

on("replaced", () => {
  $("where-kept").textContent = `${store.about.folder}${store.about.finished ? " (a finished run)" : ""}`;
  $("where-kept").title = store.about.folder;
});

async function start() {
  store.forms = await api.get("api/forms");
  await load();
  await lookAtTrial();
  for (const one of document.querySelectorAll("[data-step]")) one.addEventListener("click", () => go(one.dataset.step));
  $("help-button").addEventListener("click", () => $("help").showModal());
  document.addEventListener("keydown", keys);
  const asked = location.hash.slice(1);
  go(STEPS.includes(asked) ? asked : store.about.finished ? "run" : "choose");
  listen();
  document.documentElement.dataset.ready = "yes";
}

start().catch((error) => say(error.message, true));
