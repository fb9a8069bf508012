// Sluice's address and its three calls for a chat: the transport makes two of them, and stop() is the third.

import { DefaultChatTransport } from "ai";

// "" is the page's own origin; VITE_SLUICE_URL=https://llm.example.org at build time names another.
const CHAT = `${import.meta.env.VITE_SLUICE_URL ?? ""}/api/chat`;

// The default transport, which also says when nothing is left to resume: the server answers 204, and useChat is silent.
export class SluiceTransport extends DefaultChatTransport {
  #onGone;

  constructor({ onGone }) {
    super({ api: CHAT });
    this.#onGone = onGone;
  }

  async reconnectToStream(options) {
    const stream = await super.reconnectToStream(options);
    if (stream === null) this.#onGone();
    return stream;
  }
}

// Ends the answer for everybody who reads it. To leave is not enough: Sluice takes that for a dropped connection and goes
// on for a while, for the reader may come back. A failure is no matter, for then that while is all it costs.
export function stopAnswer(chatId) {
  const url = `${CHAT}/${encodeURIComponent(chatId)}/stop`;
  fetch(url, { method: "POST", keepalive: true }).catch(() => {});
}
