// The page: one question at a time, its answer as it is written, and what became of it.
//
//   idle → connecting → waiting → generating → done        the state stands in <html data-state>, where style.css and
//              └───────────┴───────────┴─────→ stopped     assistive technology's status line follow it; a question
//              └───────────┴───────────┴─────→ error       may be asked in every state of the first and last column

import { EndFollower } from "/follow.js";
import { AnswerStream } from "/stream.js";
import { GrowingText } from "/text.js";
import * as words from "/words.js";

const TICK_MS = 250; // one coarse timer for all that depends on time, and only while an answer is under way

const EXAMPLES = ["Explain server-sent events in three sentences.", "Write a haiku about flowing water.", "Why is the sky blue?"];
// The demo model answers out of Sluice's own documentation, and out of nothing else.
const DEMO_EXAMPLES = ["What does Sluice do?", "What happens when I press Stop?", "How do I connect a real model?"];

const page = document.documentElement;
const settings = {
  model: page.dataset.model,
  demo: page.dataset.demo === "true",
  heartbeatS: Number(page.dataset.heartbeat) || 15,
  maxQuery: Number(page.dataset.maxQuery) || 1000,
};

const element = (id) => document.getElementById(id);
const question = element("question");
const ask = element("ask");
const stop = element("stop");
const retry = element("retry");
const copy = element("copy");
const answer = element("answer");
const reasoning = element("reasoning");
const status = element("status");

const follower = new EndFollower(element("follow"));
const answerText = new GrowingText(answer, () => {
  follower.grown();
  showStats();
});
const reasoningText = new GrowingText(element("reasoning-text"), () => follower.grown());

let asked = null; // the question on show: its text, its clock, and what has come for it so far
let stream = null; // open while an answer is under way, null otherwise
let ticking = 0;

// ---- asking and ending

function begin(text) {
  stream?.close();
  asked = { text, model: settings.model, beganAt: performance.now(), firstAt: null, endedAt: null, tokens: 0, usage: {} };
  element("asked").textContent = text;
  element("welcome").hidden = true;
  element("exchange").hidden = false;
  answerText.clear();
  reasoningText.clear();
  reasoning.hidden = true;
  reasoning.open = false;
  page.dataset.finish = "";
  showModel(settings.model);
  stream = new AnswerStream(text, settings.heartbeatS, LISTENER);
  ticking = setInterval(tick, TICK_MS);
  setState("connecting", "Connecting…");
  follower.begin();
}

const LISTENER = {
  opened() {
    if (page.dataset.state === "connecting") setState("waiting", "Waiting for the first token…");
  },
  started(model) {
    showModel(model);
  },
  token(text) {
    if (asked.tokens === 0) {
      asked.firstAt ??= performance.now();
      setState("generating", "Generating…");
    }
    asked.tokens += 1;
    answerText.append(text);
  },
  reasoning(text) {
    if (reasoning.hidden) {
      reasoning.hidden = false;
      asked.firstAt ??= performance.now();
      if (asked.tokens === 0) setState("generating", "Reasoning…");
    }
    reasoningText.append(text);
  },
  usage(usage) {
    asked.usage = usage;
    showModel(usage.model);
  },
  ended(end) {
    if (end.kind === "failed") {
      finish("error", words.failure(end, asked.tokens, navigator.onLine));
    } else if (asked.usage.finish_reason === "cancelled") {
      finish("stopped", words.stopped(asked.tokens)); // stopped, but not by this page
    } else {
      const { tokens, usage } = asked;
      page.dataset.finish = usage.finish_reason ?? "";
      finish("done", words.done(usage.tokens ?? tokens, usage.duration_ms ?? performance.now() - asked.beganAt, usage.finish_reason));
    }
  },
};

function stopAnswer(why = words.stopped(asked.tokens)) {
  stream.close();
  finish("stopped", why);
}

function finish(state, sentence) {
  stream = null;
  clearInterval(ticking);
  asked.endedAt = performance.now();
  reasoningText.flush();
  answerText.flush();
  // An answer that fell short may have been the question's fault: it can be put in other words, unless the next one
  // has been begun already.
  if (state !== "done" && question.value === "") question.value = asked.text;
  checkQuestion();
  setState(state, sentence);
  showStats();
  follower.grown();
  follower.end();
}

function tick() {
  stream.check();
  // Frames may not come (a covered window), and then what waits for one would be held back until the end.
  reasoningText.flush();
  answerText.flush();
  showStats();
}

// ---- showing

function setState(state, sentence) {
  const focused = document.activeElement;
  page.dataset.state = state;
  const underWay = stream !== null;
  const ended = asked !== null && !underWay;
  answer.setAttribute("aria-busy", String(underWay));
  ask.hidden = underWay;
  stop.hidden = !underWay;
  retry.hidden = !ended;
  retry.textContent = state === "error" ? "Retry" : "Ask again";
  copy.hidden = !ended || answer.textContent === "" || navigator.clipboard === undefined; // which plain http lacks
  copy.textContent = "Copy";
  // The only words that a screen reader hears unasked: a state, never a token.
  status.textContent = sentence;
  // A button that goes away must not take the keyboard's place in the page with it.
  if (focused instanceof HTMLButtonElement && (focused.disabled || focused.getClientRects().length === 0)) {
    (underWay ? stop : question).focus({ preventScroll: true });
  }
}

function showModel(model) {
  if (typeof model !== "string" || model === "") return;
  element("model").textContent = model;
  element("model").title = model; // a long name is cut on a narrow screen
}

function showStats() {
  const { beganAt, firstAt, endedAt, usage } = asked;
  const now = endedAt ?? performance.now();
  // The server's figures where it has given them, since it sits nearer to the model; until then our own.
  const count = usage.tokens ?? asked.tokens;
  const durationMs = usage.duration_ms ?? now - beganAt;
  const ttftMs = usage.ttft_ms ?? (firstAt === null ? null : firstAt - beganAt);
  element("stats").hidden = endedAt !== null && count === 0; // nothing came: there is nothing to measure
  show("stat-tokens", count.toLocaleString("en"));
  show("stat-time", words.seconds(durationMs));
  show("stat-ttft", ttftMs === null ? "–" : words.latency(ttftMs));
  show("stat-speed", ttftMs === null ? "–" : words.speed(count, ttftMs, durationMs));
  const { prompt_tokens: prompt, completion_tokens: completion } = usage;
  const counted = Number.isInteger(prompt) && Number.isInteger(completion);
  element("stat-counted-row").hidden = !counted;
  if (counted) show("stat-counted", `${prompt.toLocaleString("en")} in, ${completion.toLocaleString("en")} out`);
}

function show(id, text) {
  const place = element(id);
  if (place.textContent !== text) place.textContent = text; // an unchanged text costs no layout
}

// ---- the question

function checkQuestion() {
  const length = words.countCodePoints(question.value.trim());
  const fault = words.tooLong(length, settings.maxQuery);
  const near = length > settings.maxQuery * 0.8;
  element("limit").textContent = fault || (near ? `${length.toLocaleString("en")} of ${settings.maxQuery.toLocaleString("en")}` : "");
  question.setAttribute("aria-invalid", String(fault !== ""));
  ask.disabled = length === 0 || fault !== "";
  return fault;
}

function submit() {
  if (stream !== null) return; // what is typed meanwhile is kept for the next question
  const fault = checkQuestion();
  if (fault !== "") {
    status.textContent = fault;
  } else if (!ask.disabled) {
    const text = question.value.trim();
    question.value = "";
    checkQuestion();
    begin(text);
  }
}

question.addEventListener("input", checkQuestion);
question.addEventListener("keydown", (event) => {
  // Enter also confirms what an input method composes (keyCode 229 is how older Safari tells), and then asks nothing.
  if (event.key !== "Enter" || event.shiftKey || event.isComposing || event.keyCode === 229) return;
  event.preventDefault();
  if (!event.repeat) submit(); // a key held down asks once
});
element("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  submit();
});

// ---- the other controls

stop.addEventListener("click", (event) => {
  if (event.detail < 2) stopAnswer(); // Stop stands where Ask was, under the second half of a double click
});
addEventListener("keydown", (event) => {
  if (event.key === "Escape" && !event.isComposing && stream !== null) stopAnswer();
});
retry.addEventListener("click", () => {
  if (question.value === asked.text) question.value = ""; // put back by finish(), not typed
  checkQuestion();
  begin(asked.text);
});
copy.addEventListener("click", async () => {
  try {
    await navigator.clipboard.writeText(answer.textContent);
    copy.textContent = "Copied";
  } catch {
    copy.textContent = "Could not copy";
  }
});
element("follow").addEventListener("click", () => {
  follower.begin();
  stop.focus({ preventScroll: true });
});

// ---- coming and going

// A page that is left wants no more of the answer. The browser may keep it whole and bring it back with the Back button
// (bfcache), and then it says what happened, rather than wait for a connection that is no more.
addEventListener("pagehide", () => {
  if (stream !== null) stopAnswer("Stopped, because you left the page");
});
addEventListener("pageshow", checkQuestion); // browsers put typed text back without an input event

showModel(settings.model);
element("demo-note").hidden = !settings.demo;
for (const text of settings.demo ? DEMO_EXAMPLES : EXAMPLES) {
  const item = document.createElement("li");
  const button = document.createElement("button");
  button.type = "button";
  button.textContent = text;
  button.addEventListener("click", () => begin(text));
  item.append(button);
  element("examples").append(item);
}
checkQuestion();
