// A conversation as a value: its turns, and what of them is sent to the server. Pure; it is stored as it is.

const MAX_MESSAGES = 1000; // the server's bounds of a body
const MAX_BODY_BYTES = 1_000_000; // 1 MiB, less what stands round the messages
const TITLE_CHARS = 60;

export const newId = () =>
  // crypto.randomUUID would need a secure context, which plain http on a local network is not.
  [...crypto.getRandomValues(new Uint8Array(12))].map((byte) => byte.toString(16).padStart(2, "0")).join("");

export const newConversation = () => ({ id: newId(), revision: "", at: Date.now(), turns: [] });

// One question and its answer. `state` is "running", "done", "stopped" or "error", and `sentence` says more;
// `url` and `lastId` are the stream's, while it runs; `left` says that the server was asked to stop it as the page was
// left. Times are in ms since 1970: they outlive a reload.
export const newTurn = (question) => ({
  question,
  answer: "",
  reasoning: "",
  tokens: 0,
  usage: {},
  model: "",
  state: "running",
  sentence: "",
  url: "",
  lastId: "",
  left: false,
  beganAt: Date.now(),
  firstAt: null,
  endedAt: null,
});

// A conversation as it was stored: by this page, by an older version of it, or by who knows what else lives at this
// address. null where it is none.
export function readConversation(value) {
  const texts = (turn) => ["question", "answer", "reasoning"].every((name) => typeof turn[name] === "string");
  if (typeof value?.id !== "string" || !Array.isArray(value.turns)) return null;
  const turns = value.turns.map((turn) => ({ ...newTurn(""), state: "error", ...turn }));
  return turns.every(texts) ? { ...newConversation(), ...value, turns } : null;
}

export function titleOf({ turns }) {
  const [line] = (turns[0]?.question ?? "").split("\n");
  const characters = [...line];
  return characters.length > TITLE_CHARS ? `${characters.slice(0, TITLE_CHARS).join("")}…` : line;
}

// What the server is sent to have the last question answered: as many turns before it as its bounds allow, the oldest
// left out first. An answer that never began is left out: it would tell the model that it had nothing to say.
export function messagesOf({ turns }, maxMessage) {
  const chosen = [];
  let bytes = 0;
  for (const [place, { question, answer }] of [...turns.entries()].reverse()) {
    const turn = [{ role: "user", content: fit(question, maxMessage) }];
    const last = place === turns.length - 1;
    if (!last && answer.trim() !== "") turn.push({ role: "assistant", content: fit(answer, maxMessage) });
    bytes += turn.reduce((sum, message) => sum + bytesOf(JSON.stringify(message)) + 1, 0);
    if (!last && (chosen.length + turn.length > MAX_MESSAGES || bytes > MAX_BODY_BYTES)) break;
    chosen.unshift(...turn);
  }
  return chosen;
}

const bytesOf = (text) => new TextEncoder().encode(text).length;

// What the server would refuse is taken out: a NUL, half of a surrogate pair, and what is over a message's bound.
function fit(text, maxMessage) {
  const clean = text.replaceAll("\0", "").replace(/\p{Surrogate}/gu, "\uFFFD");
  return clean.length <= maxMessage ? clean : [...clean].slice(0, maxMessage).join("");
}
