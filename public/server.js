// What the page asks of the server besides the stream itself: to begin an answer, to stop one, and why a stream is shut.

const PATIENCE_MS = 30_000;

// The server's "no": its code and its words, and after how many seconds it is worth another try (null: it did not say).
// A status of 0 is no answer at all.
export class Refusal extends Error {
  constructor(status, code, message, retryAfterS) {
    super(message);
    this.name = "Refusal";
    this.status = status;
    this.code = code;
    this.retryAfterS = retryAfterS;
  }
}

// Begins an answer to a conversation and resolves to the URL of its stream. Throws a Refusal.
export async function beginStream(messages) {
  const response = await ask("/api/streams", {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify({ messages }),
    signal: AbortSignal.timeout(PATIENCE_MS),
  });
  if (response.status !== 201) throw await readRefusal(response);
  const url = response.headers.get("Location"); // and not from the body, which a cut connection may still withhold
  if (url === null) throw new Refusal(0, "unreachable", "", null);
  return url;
}

// Ends an answer at its source. `keepalive`: the browser sends it even though the page goes away at once. Should it
// not arrive, the server ends the answer by itself a moment after its last viewer has left; it is told all the same as
// soon as there is a network again.
export function stopStream(url) {
  fetch(url, { method: "DELETE", keepalive: true }).catch(() => {
    addEventListener("online", () => stopStream(url), { once: true });
  });
}

// Why an EventSource was refused, which it does not tell itself: null where a new one would be let in, else the Refusal.
export async function whyShut(url) {
  const abort = new AbortController();
  const timeout = setTimeout(() => abort.abort(), PATIENCE_MS);
  try {
    const response = await ask(url, { headers: { Accept: "text/event-stream" }, signal: abort.signal });
    return response.status === 200 ? null : await readRefusal(response);
  } catch (refusal) {
    return refusal;
  } finally {
    clearTimeout(timeout);
    abort.abort(); // whoever looks reads no stream
  }
}

async function ask(url, options) {
  try {
    return await fetch(url, { cache: "no-store", ...options });
  } catch (error) {
    throw new Refusal(0, error.name === "TimeoutError" ? "unanswered" : "unreachable", "", null);
  }
}

async function readRefusal(response) {
  const body = await response.json().catch(() => ({})); // a proxy's 502 is no JSON
  const seconds = response.headers.get("Retry-After");
  return new Refusal(
    response.status,
    typeof body?.error === "string" ? body.error : "refused",
    typeof body?.message === "string" ? body.message : "",
    /^\d+$/.test(seconds ?? "") ? Number(seconds) : null,
  );
}
