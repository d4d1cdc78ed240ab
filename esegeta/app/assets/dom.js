// Elements without markup in texts: what comes from files and names is always text.
export const $ = (id) => document.getElementById(id);

export function el(tag, attributes = {}, ...children) {
  const found = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === undefined || value === null || value === false) continue;
    if (name.startsWith("on")) found.addEventListener(name.slice(2), value);
    else if (name === "value" || name === "checked" || name === "disabled") found[name] = value;
    else if (name === "data") Object.assign(found.dataset, value);
    else found.setAttribute(name, value === true ? "" : value);
  }
  found.append(...children.flat().filter((child) => child !== null && child !== undefined && child !== false));
  return found;
}

export const button = (text, onclick, more = {}) => el("button", { type: "button", onclick, ...more }, text);

export function options(select, entries, value) {
  select.replaceChildren(...entries.map((one) => {
    const [key, text] = Array.isArray(one) ? one : [one, one];
    return el("option", { value: key }, text);
  }));
  if (value !== undefined && value !== null) select.value = value;
  return select;
}

export function say(text, bad = false) {
  $("say").textContent = text;
  $("say").classList.toggle("bad", bad);
}

// What was wrong may not be wrong any more.
export const unsay = () => { if ($("say").classList.contains("bad")) say(""); };

export const short = (value) => {
  if (value === null || value === undefined || value === "") return "";
  if (typeof value !== "number") return String(value);
  return value === 0 ? "0" : Number(value.toPrecision(3)).toString().replace(/e\+?/, " × 10^");
};

export const time = (seconds) => {
  if (seconds === null || seconds === undefined) return "";
  if (seconds < 1) return "under 1 s";
  if (seconds < 100) return `${Math.round(seconds)} s`;
  const minutes = Math.round(seconds / 60);
  return minutes < 100 ? `${minutes} min` : `${Math.floor(minutes / 60)} h ${minutes % 60} min`;
};

let numbers = 0;
export const fresh = (prefix) => `${prefix}-${++numbers}`;
