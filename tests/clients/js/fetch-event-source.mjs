// Reads a stream with `@microsoft/fetch-event-source`, and tells every event and every lost connection.
import { given, tell } from "./harness.mjs";

// It was written for browsers, and asks them for timers and whether the page is hidden.
globalThis.window = globalThis;
globalThis.document = Object.assign(new EventTarget(), { hidden: false });

const { fetchEventSource } = await import("@microsoft/fetch-event-source");

const leaving = new AbortController();
await fetchEventSource(given.url, {
  signal: leaving.signal,
  onmessage({ event, data, id }) {
    tell({ type: event || "message", data, id });
    if (data === "[DONE]") leaving.abort();
  },
  onerror() {
    tell({ type: "lost" }); // and returning nothing has it try again, after what `retry:` said
  },
});
