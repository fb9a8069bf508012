// One answer over one EventSource: what the server says becomes calls to a listener, then exactly one end. No DOM here.
//
// EventSource reconnects by itself whenever a response ends, even after a complete answer, and the same GET again would
// be a second generation that somebody pays for. So whatever ends an answer also closes the EventSource, at once.

// A connection silent for so many heartbeats is dead: two pings are missing, and the half is room for a slow network.
const SILENT_HEARTBEATS = 2.5;

export class AnswerStream {
  #source;
  #listener;
  #silenceMs;
  #opened = false;
  #heardAt = performance.now();
  #checkedAt = performance.now();
  #suspect = false;

  // The listener has opened(), started(model), token(text), reasoning(text), usage(object) and ended(end). An end is
  // {kind: "done"} or {kind: "failed", cause, …}; the causes are "refused" (never opened: EventSource shows no status),
  // "lost" (broke off), "unanswered" and "silent" (no event, no ping, for too long, before and after it opened), and
  // "reported" (the server said why: code, message, retryable). After ended() or close() nothing is called any more.
  constructor(question, heartbeatS, listener) {
    this.#listener = listener;
    this.#silenceMs = SILENT_HEARTBEATS * heartbeatS * 1000;
    // URLSearchParams and not encodeURIComponent, which throws on half a surrogate pair.
    const source = new EventSource(`/api/stream?${new URLSearchParams({ q: question })}`);
    this.#source = source;
    const hear = (type, handle) =>
      source.addEventListener(type, (event) => {
        if (this.#source === null) return; // queued before close()
        this.#heardAt = performance.now();
        handle(event);
      });
    hear("open", () => {
      this.#opened = true;
      listener.opened();
    });
    hear("start", ({ data }) => listener.started(readObject(data).model));
    hear("message", ({ data }) => this.#readMessage(data));
    hear("reasoning", ({ data }) => {
      const { reasoning } = readObject(data);
      if (typeof reasoning === "string") listener.reasoning(reasoning);
    });
    hear("usage", ({ data }) => listener.usage(readObject(data)));
    hear("ping", () => {}); // that it was heard is all that it says
    hear("error", () => this.#fail(this.#opened ? "lost" : "refused"));
  }

  // Ends it without a word to the listener. The connection closes, and the server stops the model.
  close() {
    this.#source?.close();
    this.#source = null;
  }

  // Looks whether the connection has gone silent; to be called a few times a second.
  check() {
    if (this.#source === null) return;
    const now = performance.now();
    // A page that slept (a closed lid, a frozen tab) finds its timer due before the events that came meanwhile. So what
    // a late check finds is only a suspicion, which any event clears before the next check.
    const overslept = now - this.#checkedAt > this.#silenceMs / 2;
    this.#checkedAt = now;
    if (now - this.#heardAt <= this.#silenceMs) {
      this.#suspect = false;
    } else if (overslept && !this.#suspect) {
      this.#suspect = true;
    } else {
      this.#fail(this.#opened ? "silent" : "unanswered");
    }
  }

  #readMessage(data) {
    if (data === "[DONE]") {
      this.#end({ kind: "done" });
      return;
    }
    const { token, error, message, retryable } = readObject(data);
    if (error !== undefined) {
      this.#fail("reported", { code: String(error), message, retryable: retryable === true });
    } else if (typeof token === "string") {
      this.#listener.token(token);
    }
  }

  #fail(cause, details = {}) {
    this.#end({ kind: "failed", cause, ...details });
  }

  #end(end) {
    this.close();
    this.#listener.ended(end);
  }
}

// The JSON object in an event; an empty one for anything else, so that a newer server's event harms no older page.
function readObject(data) {
  try {
    const value = JSON.parse(data);
    return typeof value === "object" && value !== null ? value : {};
  } catch {
    return {};
  }
}
