// Every request goes to the server that the page came from, below the path that it came from.
export class Refused extends Error {
  constructor(status, lines) {
    super(lines[0]);
    this.status = status;
    this.lines = lines;
  }
}

async function answered(response) {
  if (response.ok) return response;
  let lines = [`The server answers ${response.status}.`];
  try {
    const found = await response.json();
    lines = found.errors || [found.error];
  } catch { /* it is no JSON: the status has to do */ }
  throw new Refused(response.status, lines);
}

const asked = async (path, how) => answered(await fetch(path, { credentials: "same-origin", ...how }));
export const address = (path, query) => (query ? `${path}?${new URLSearchParams(query)}` : path);
export const get = async (path, query) => (await asked(address(path, query))).json();
export const text = async (path) => (await asked(path)).text();
export const send = async (path, content, method = "POST") =>
  (await asked(path, { method, body: JSON.stringify(content), headers: { "content-type": "application/json" } })).json();
export const sendText = async (path, content) => (await asked(path, { method: "PUT", body: content })).json();
export const upload = async (file) =>
  (await asked(address("api/uploads", { name: file.name }), { method: "POST", body: file })).json();

// A volume for the viewer, with what its whole numbers stand for.
export async function volume(query) {
  const response = await asked(address("api/results/volume", query));
  const about = JSON.parse(response.headers.get("x-esegeta-copy"));
  const inflated = response.body.pipeThrough(new DecompressionStream("gzip"));
  return { about, buffer: await new Response(inflated).arrayBuffer() };
}
