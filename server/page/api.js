// Requests to the server: the key, errors in words, and server-sent events over fetch.

const KEY = "vmalloc-api-key";
let memoryKey = "";

/** The API key, in this tab's session only. */
export const apiKey = {
  get() {
    try {
      return sessionStorage.getItem(KEY) ?? memoryKey;
    } catch {
      return memoryKey;
    }
  },
  set(value) {
    memoryKey = value;
    try {
      if (value) sessionStorage.setItem(KEY, value);
      else sessionStorage.removeItem(KEY);
    } catch {
      // It is in memory at least.
    }
  },
};

/** What the server refused, with its status and its own words. */
export class ServerError extends Error {
  constructor(status, message, retryAfter = null) {
    super(message);
    this.status = status;
    this.retryAfter = retryAfter;
  }
}

const STATUS_WORDS = {
  401: "The server wants an API key",
  403: "The API key does not allow this",
  404: "Not found",
  429: "The server is full",
  503: "The server is not ready",
};

/** An error as a sentence or two. */
export function readable(error) {
  if (error instanceof ServerError) {
    const words = STATUS_WORDS[error.status];
    const wait = error.retryAfter ? ` Try again in ${error.retryAfter} s.` : "";
    return (words ? `${words}: ` : "") + error.message + wait;
  }
  if (error instanceof TypeError) return "The server cannot be reached.";
  return error.message || String(error);
}

/** fetch with the key; throws ServerError unless the status is 2xx. */
export async function request(path, options = {}) {
  const headers = new Headers(options.headers);
  const key = apiKey.get();
  if (key) headers.set("Authorization", `Bearer ${key}`);
  const response = await fetch(path, { ...options, headers, credentials: "omit" });
  if (response.ok) return response;
  let message = response.statusText || `status ${response.status}`;
  try {
    const body = await response.json();
    message = body.error?.message ?? body.detail ?? message;
  } catch {
    // Not JSON: the status has to do.
  }
  throw new ServerError(response.status, String(message), response.headers.get("Retry-After"));
}

export async function getJson(path) {
  return (await request(path)).json();
}

/** Yields {event, data} of a server-sent event stream; null for each comment (keep-alive). */
export async function* readEvents(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  let event = "message";
  let data = [];
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      rest += value;
      // A lone CR at the end may be the first half of a CRLF.
      const end = rest.endsWith("\r") ? rest.length - 1 : rest.length;
      const lines = rest.slice(0, end).split(/\r\n|\n|\r/);
      rest = lines.pop() + rest.slice(end);
      for (const line of lines) {
        if (line === "") {
          if (data.length) yield { event, data: data.join("\n") };
          event = "message";
          data = [];
        } else if (line.startsWith(":")) {
          yield null;
        } else {
          const colon = line.indexOf(":");
          const name = colon < 0 ? line : line.slice(0, colon);
          const text = colon < 0 ? "" : line.slice(colon + 1).replace(/^ /, "");
          if (name === "data") data.push(text);
          if (name === "event") event = text;
        }
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}
