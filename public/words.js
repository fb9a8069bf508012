// What the page says: numbers and outcomes as words. Pure functions, no DOM.

export const countCodePoints = (text) => [...text].length; // as the server counts, where 👍 is one and its length two

export const seconds = (ms) => `${(ms / 1000).toFixed(1)} s`;

export const latency = (ms) => (ms < 1000 ? `${Math.round(ms)} ms` : seconds(ms));

export const tokens = (count) => `${count.toLocaleString("en")} ${count === 1 ? "token" : "tokens"}`;

// Tokens a second after the first one, which TTFT tells of; "–" where there is no such second.
export function speed(count, ttftMs, durationMs) {
  const elapsedMs = durationMs - ttftMs;
  if (count < 2 || !(elapsedMs >= 1)) return "–";
  const perSecond = ((count - 1) / elapsedMs) * 1000;
  return perSecond < 100 ? perSecond.toFixed(1) : Math.round(perSecond).toLocaleString("en");
}

// Why the model ended, where that is not simply the end of what it had to say.
const FINISHES = {
  length: "The answer was cut at the token limit.",
  content_filter: "The answer was cut by the content filter.",
  tool_calls: "The model asked for a tool, and this page has none.",
};

export function done(count, durationMs, finishReason) {
  const words = [`Done: ${tokens(count)} in ${seconds(durationMs)}`];
  if (Object.hasOwn(FINISHES, finishReason)) words.push(FINISHES[finishReason]);
  else if (count === 0) words.push("The model ended without a word.");
  return words.length === 1 ? words[0] : words.join(". ");
}

export const stopped = (count) => (count === 0 ? "Stopped before the first token" : `Stopped after ${tokens(count)}`);

export const LEFT = "Stopped, because you left the page";
export const TURNED_AWAY = "Stopped, because you turned to another chat";
export const REMOVED = "Stopped, because this chat was deleted in another tab";
export const NOT_BEGUN = "The page was reloaded before the server had begun to answer.";

export const reconnecting = (online) =>
  online ? "Reconnecting…" : "You are offline. The answer goes on when you are back.";

const CAUSES = {
  lost: "The connection was lost, and the server could not be reached again.",
  gone: "The answer was interrupted: the server has it no longer.",
};

// The sentence for a failed end (stream.js says which there are); `count` tokens had come.
export function failure({ cause, message, retryable, refusal }, count, online) {
  const words = [];
  if (cause === "reported") {
    words.push(said(message) || "The server reported an error.");
    if (!retryable) words.push("Asking the same again is unlikely to help.");
  } else {
    words.push(cause === "refused" ? refused(refusal, online) : CAUSES[cause]);
  }
  if (count > 0) words.push("The answer is incomplete.");
  return words.join(" ");
}

// The sentence for what the server refused to begin (server.js: Refusal).
export function refused({ status, code, message, retryAfterS }, online) {
  if (status === 0) {
    if (!online) return "You seem to be offline. Connect, then retry.";
    if (code === "unanswered") return "The server did not answer in time.";
    return "The server could not be reached. Wait a moment, then retry.";
  }
  // The server's own words for this one speak of a header, to those who program.
  const why = code === "rate_limit_exceeded" ? "You are asking faster than this server allows." : said(message);
  const words = [why || `The server refused, with the status ${status}.`];
  if (retryAfterS !== null) words.push(`Try again in ${retryAfterS} s.`);
  return words.join(" ");
}

const said = (message) => (typeof message === "string" ? message : "");

// What is wrong with a question of that length, or "".
export function tooLong(length, limit) {
  const over = length - limit;
  if (over <= 0) return "";
  return `Too long by ${over.toLocaleString("en")}: a question may have ${limit.toLocaleString("en")} characters.`;
}
