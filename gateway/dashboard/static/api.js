// The gateway's /v1: requests with the token, and the event stream with resume.

const TOKEN = "podium-token";
const RETRY_MS = 1000;

export const token = () => sessionStorage.getItem(TOKEN) ?? "";
export const setToken = (text) =>
  text ? sessionStorage.setItem(TOKEN, text) : sessionStorage.removeItem(TOKEN);

/** An error response of the gateway. */
export class Refused extends Error {
  constructor(status, detail) {
    super(detail);
    this.status = status;
  }
}

async function request(path, options = {}) {
  const headers = { ...options.headers };
  if (token()) headers.Authorization = `Bearer ${token()}`;
  const response = await fetch(path, { ...options, headers, cache: "no-store" });
  if (response.ok) return response;
  const problem = await response.json().catch(() => ({}));
  throw new Refused(response.status, problem.detail ?? response.statusText);
}

export const get = async (path) => (await request(path)).json();

export const post = async (path, body) =>
  (await request(path, {
    method: "POST", body: JSON.stringify(body), headers: { "Content-Type": "application/json" },
  })).json();

/**
 * Follow the events for ever, resuming after the last one that was received. `on(type, data)` gets each;
 * `onLink(text, live)` the state of the link. EventSource can't send a token, so this reads the stream itself.
 */
export async function follow(on, onLink) {
  let last = "";
  for (;;) {
    try {
      const after = last ? `?after=${encodeURIComponent(last)}` : "";
      const response = await request(`/v1/events${after}`);
      onLink("live", true);
      await readEvents(response.body.getReader(), (event) => {
        if (event.id) last = event.id;
        on(event.type, event.data);
      });
      onLink("reconnecting", false);
    } catch (error) {
      if (error instanceof Refused && error.status === 400) last = "";
      onLink(error instanceof Refused ? error.message : "no gateway: reconnecting", false, error.status);
    }
    await new Promise((resolve) => setTimeout(resolve, RETRY_MS));
  }
}

async function readEvents(reader, on) {
  const decoder = new TextDecoder();
  let text = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    text += decoder.decode(value, { stream: true });
    const frames = text.split("\n\n");
    text = frames.pop();
    for (const frame of frames) {
      const fields = Object.fromEntries(
        frame.split("\n").filter((line) => !line.startsWith(":") && line.includes(": ")).map((line) => {
          const end = line.indexOf(": ");
          return [line.slice(0, end), line.slice(end + 2)];
        }));
      if (fields.data) on({ id: fields.id, type: fields.event, data: JSON.parse(fields.data) });
    }
  }
}
