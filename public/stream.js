// One answer's stream: what the server says becomes calls to a listener, then exactly one end. No DOM here.
//
// A lost connection is no lost answer. EventSource reconnects by itself and names the last event that it has seen, and the
// server goes on behind it. This class adds what EventSource lacks: it notices a connection that has gone silent, comes
// back after a refusal (a proxy's 502 while the server restarts shuts an EventSource for good), and gives up in the end.
// After a complete answer EventSource would reconnect too: whatever ends an answer closes it, at once.

import { whyShut } from "/server.js";

// A connection silent for so many heartbeats is dead: two pings are missing, and the half is room for a slow network.
const SILENT_HEARTBEATS = 2.5;

const GIVE_UP_MS = 30_000; // without a sign of life from the server, while the browser believes to be online
const FIRST_PAUSE_MS = 500;
const LONGEST_PAUSE_MS = 5_000;

export class AnswerStream {
  #url;
  #listener;
  #silenceMs;
  #source = null;
  #ended = false;
  #lastId;
  #connected = true; // as far as the listener was told
  #heardAt = performance.now();
  #checkedAt = performance.now();
  #suspect = false;
  #lostAt = null; // since when there is no sign of life
  #pauseMs = FIRST_PAUSE_MS;
  #pause = 0;
  #onOnline = () => this.#hurry();

  // Reads the stream at `url`, behind the event `lastId` ("" for its start).
  //
  // The listener has heard(id) for each event that counts, before what is in it: started(model), token(text),
  // reasoning(text), usage(object); and opened() and lost() for the connection, and ended(end). An end is
  // {kind: "done"} or {kind: "failed", cause, …}; the causes are "reported" (the server said why: code, message,
  // retryable), "gone" (it knows no such answer any more), "refused" (with the refusal) and "lost" (not heard of for too
  // long). After ended() or close() nothing is called any more.
  constructor({ url, lastId, heartbeatS, listener }) {
    this.#url = url;
    this.#lastId = lastId;
    this.#listener = listener;
    this.#silenceMs = SILENT_HEARTBEATS * heartbeatS * 1000;
    addEventListener("online", this.#onOnline);
    this.#open();
  }

  // Ends it without a word to the listener.
  close() {
    this.#ended = true;
    this.#shut();
    removeEventListener("online", this.#onOnline);
  }

  // Looks whether the connection has gone silent, or is lost for too long; to be called a few times a second.
  check() {
    if (this.#ended) return;
    const now = performance.now();
    // A page that slept (a closed lid, a frozen tab) finds its timer due before the events that came meanwhile. So what
    // a late check finds is only a suspicion, which any event clears before the next check.
    const overslept = now - this.#checkedAt > this.#silenceMs / 2;
    this.#checkedAt = now;
    if (!navigator.onLine) {
      if (this.#lostAt !== null) this.#lostAt = now; // waiting for a network is not giving up on the server
      return;
    }
    const silent = now - this.#heardAt > this.#silenceMs;
    if (silent && overslept && !this.#suspect) {
      this.#suspect = true;
    } else if (this.#lostAt !== null && now - this.#lostAt > GIVE_UP_MS && (silent || !this.#isOpen())) {
      this.#fail("lost");
    } else if (silent && this.#source !== null) {
      this.#open();
      this.#lose();
    }
  }

  // An open connection may say nothing for a heartbeat, however long that is.
  #isOpen() {
    return this.#source?.readyState === EventSource.OPEN;
  }

  #address() {
    return this.#lastId === "" ? this.#url : `${this.#url}?${new URLSearchParams({ last_event_id: this.#lastId })}`;
  }

  #open() {
    this.#shut();
    const source = new EventSource(this.#address());
    this.#source = source;
    this.#heardAt = performance.now();
    const hear = (type, handle) =>
      source.addEventListener(type, (event) => {
        if (this.#source === source) handle(event); // and not one queued before it was shut
      });
    const read = (type, handle) =>
      hear(type, (event) => {
        this.#find();
        handle(event);
      });
    hear("open", () => {
      this.#connected = true;
      this.#listener.opened();
    });
    hear("error", () => (source.readyState === EventSource.CLOSED ? this.#refused() : this.#lose()));
    read("ping", () => {}); // that it was heard is all that it says
    read("message", (event) => this.#readMessage(event));
    read("start", (event) => this.#take(event, ({ model }) => this.#listener.started(model)));
    read("usage", (event) => this.#take(event, (usage) => this.#listener.usage(usage)));
    read("reasoning", (event) =>
      this.#take(event, ({ reasoning }) => {
        if (typeof reasoning === "string") this.#listener.reasoning(reasoning);
      }),
    );
  }

  #shut() {
    clearTimeout(this.#pause);
    this.#source?.close();
    this.#source = null;
  }

  #readMessage(event) {
    if (event.data === "[DONE]") {
      this.#end({ kind: "done" });
      return;
    }
    const { error, message, retryable } = readObject(event.data);
    if (error !== undefined) {
      this.#fail("reported", { code: String(error), message, retryable: retryable === true });
      return;
    }
    this.#take(event, ({ token }) => {
      if (typeof token === "string") this.#listener.token(token);
    });
  }

  // Hands an event on once: should a server or a proxy repeat one after a reconnection, its text must not stand twice.
  #take({ lastEventId, data }, hand) {
    if (lastEventId !== "") {
      if (numberOf(lastEventId) <= numberOf(this.#lastId)) return;
      this.#lastId = lastEventId;
      this.#listener.heard(lastEventId);
    }
    hand(readObject(data));
  }

  // ---- the connection

  // A sign of life; that a connection was opened is none, since a proxy may have opened it on its own.
  #find() {
    this.#heardAt = performance.now();
    this.#suspect = false;
    this.#lostAt = null;
    this.#pauseMs = FIRST_PAUSE_MS;
  }

  #lose() {
    this.#lostAt ??= performance.now();
    if (this.#connected) {
      this.#connected = false;
      this.#listener.lost();
    }
  }

  // An EventSource that was refused tries no more, and does not say why. (One whose page is being left fires the same
  // event: the pause before anything is asked outlasts that page.)
  #refused() {
    this.#shut();
    this.#lose();
    this.#wait();
  }

  #wait() {
    // Spread out, so that the pages of a server that restarts do not come back all at once.
    const pauseMs = this.#pauseMs * (0.5 + Math.random());
    this.#pauseMs = Math.min(2 * this.#pauseMs, LONGEST_PAUSE_MS);
    this.#pause = setTimeout(() => this.#look(), pauseMs);
  }

  async #look() {
    const refusal = await whyShut(this.#address());
    if (this.#ended || this.#source !== null) return;
    if (refusal === null) this.#open();
    else if (refusal.status === 204) this.#end({ kind: "done" }); // there is nothing behind what was seen
    else if (refusal.status === 404) this.#fail("gone");
    else if (refusal.status === 0 || refusal.status === 429 || refusal.status >= 500) this.#wait();
    else this.#fail("refused", { refusal });
  }

  // The network is back: that is worth a try at once.
  #hurry() {
    if (this.#lostAt === null) return;
    this.#lostAt = performance.now();
    this.#open();
  }

  // ---- the end

  #fail(cause, details = {}) {
    this.#end({ kind: "failed", cause, ...details });
  }

  #end(end) {
    this.close();
    this.#listener.ended(end);
  }
}

// The N of SID.N; -1 for no id.
const numberOf = (id) => (id === "" ? -1 : Number(id.slice(id.lastIndexOf(".") + 1)));

// The JSON object in an event; an empty one for anything else, so that a newer server's event harms no older page.
function readObject(data) {
  try {
    const value = JSON.parse(data);
    return typeof value === "object" && value !== null ? value : {};
  } catch {
    return {};
  }
}
