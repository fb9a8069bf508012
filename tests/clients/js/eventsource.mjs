// Reads a stream with the `eventsource` package, and tells every event and every lost connection.
import { EventSource } from "eventsource";
import { given, tell } from "./harness.mjs";

const awake = setInterval(() => {}, 1000); // its own timer, until it reconnects, would let Node end
const source = new EventSource(given.url);

for (const type of ["start", "message", "reasoning", "usage", "ping"]) {
  source.addEventListener(type, ({ data, lastEventId }) => {
    tell({ type, data, id: lastEventId });
    if (data === "[DONE]" && !given.stays) {
      source.close();
      clearInterval(awake);
    }
  });
}
source.onerror = () => {
  const givenUp = source.readyState === source.CLOSED;
  tell({ type: givenUp ? "closed" : "lost" });
  if (givenUp) clearInterval(awake);
};
