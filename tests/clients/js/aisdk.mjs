// A chat of the AI SDK as `useChat` holds it, of the version `given.sdk`. It takes the steps that it is given one after
// the other, tells every change of what a page would show, and at last what each step came to.
import { given, tell } from "./harness.mjs";

const { AbstractChat, DefaultChatTransport } = await import(given.sdk);

const parts = []; // of this step's stream, as the SDK read them and found them valid
const ends = []; // what onFinish was told in this step

// What the state of @ai-sdk/react does, with a listener in the place of React.
class Shown {
  #status = "ready";
  error;
  messages = structuredClone(given.messages);
  changed = () => {};

  get status() {
    return this.#status;
  }

  set status(status) {
    this.#status = status;
    this.changed();
  }

  pushMessage(message) {
    this.messages = [...this.messages, structuredClone(message)];
    this.changed();
  }

  popMessage() {
    this.messages = this.messages.slice(0, -1);
    this.changed();
  }

  replaceMessage(index, message) {
    this.messages = this.messages.with(index, structuredClone(message));
    this.changed();
  }

  snapshot(value) {
    return structuredClone(value);
  }
}

// Keeps the parts that came. A body that breaks says so in Chromium's words and not in Node's ("terminated"), for from
// those words the SDK knows a lost network.
class Transport extends DefaultChatTransport {
  processResponseStream(body) {
    const reader = body.getReader();
    const inBrowser = new ReadableStream({
      async pull(controller) {
        try {
          const { done, value } = await reader.read();
          if (done) controller.close();
          else controller.enqueue(value);
        } catch (error) {
          controller.error(error.name === "AbortError" ? error : new TypeError("network error"));
        }
      },
      cancel: (reason) => reader.cancel(reason),
    });
    const keep = new TransformStream({
      transform(part, controller) {
        parts.push(part);
        controller.enqueue(part);
      },
    });
    return super.processResponseStream(inBrowser).pipeThrough(keep);
  }
}

class Chat extends AbstractChat {
  constructor(shown, options) {
    super({ ...options, state: shown });
  }
}

const shown = new Shown();
const chat = new Chat(shown, {
  id: given.id,
  transport: new Transport({ api: `${given.url}/api/chat` }),
  onFinish: ({ isAbort, isDisconnect, isError }) => ends.push({ isAbort, isDisconnect, isError }),
});

const textOf = ({ role, parts }) =>
  role === "assistant" ? parts.map((part) => (part.type === "text" ? part.text : "")).join("") : "";

const steps = {
  send: ({ text }) => chat.sendMessage({ text }),
  regenerate: () => chat.regenerate(),
  resume: () => chat.resumeStream(),
};

const came = [];
for (const step of given.steps) {
  parts.length = ends.length = 0;
  shown.changed = () => {
    const last = shown.messages.at(-1);
    const text = last ? textOf(last) : "";
    tell({ status: shown.status, role: last?.role, id: last?.id, text });
    if (step.stopAt && text === step.stopAt) chat.stop();
  };
  await steps[step.do](step);
  const { status, error, messages } = chat;
  came.push(structuredClone({ status, error: error?.message ?? null, messages, parts, ends }));
}
tell({ steps: came });
