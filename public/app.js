// The page: a conversation, one answer at a time as it is written, and what became of each.
//
//   idle → connecting → waiting → generating → done        the state stands in <html data-state>, where style.css and
//              ├───────────┴─────┬─────┴─────→ stopped     assistive technology's status line follow it; a question
//              │           reconnecting ─────→ error       may be asked in every state of the first and last column
//              └───────────────────────────────↗

import { ChatList } from "/chats.js";
import { canCopy } from "/clipboard.js";
import { messagesOf, newConversation, newTurn } from "/conversation.js";
import { showFigures } from "/figures.js";
import { EndFollower } from "/follow.js";
import { History } from "/history.js";
import { onLeaving } from "/leaving.js";
import { QuestionField } from "/question.js";
import { beginStream, stopStream } from "/server.js";
import { AnswerStream } from "/stream.js";
import { TurnView } from "/turn.js";
import * as words from "/words.js";

const TICK_MS = 250; // one coarse timer for all that depends on time, and only while an answer is under way
const DOUBLE_CLICK_MS = 400;
const SAVE_MS = 1000; // of an answer under way, no more than that is lost with the browser

const EXAMPLES = ["Explain server-sent events in three sentences.", "Write a haiku about flowing water.", "Why is the sky blue?"];
// The demo model answers out of Sluice's own documentation, and out of nothing else.
const DEMO_EXAMPLES = ["What does Sluice do?", "What happens when I press Stop?", "How do I connect a real model?"];

const page = document.documentElement;
page.classList.toggle("cannot-copy", !canCopy);
const settings = {
  model: page.dataset.model,
  demo: page.dataset.demo === "true",
  heartbeatS: Number(page.dataset.heartbeat) || 15,
  maxMessage: Number(page.dataset.maxMessage) || 32_000,
};

const element = (id) => document.getElementById(id);
const question = element("question");
const ask = element("ask");
const stop = element("stop");
const retry = element("retry");
const status = element("status");

const history = new History();
const follower = new EndFollower(element("follow"));
const field = new QuestionField(question, element("limit"), ask, settings.maxMessage);

let conversation = newConversation();
let views = []; // of its turns, in the same order
let running = null; // the answer under way: its turn and view, and its stream once there is one
let ticking = 0;
let savedAt = 0;
let own = history.takeOwn(); // the URL of the stream that this tab has begun: only who began an answer ends it by leaving
let fault = ""; // what is wrong with a question that was not sent

// ---- asking

function begin(text, place = conversation.turns.length) {
  if (running !== null) stopAnswer(); // an earlier question was changed meanwhile
  const focused = document.activeElement;
  cut(place);
  const turn = newTurn(text);
  conversation.turns.push(turn);
  history.change(conversation);
  const view = addView(turn);
  showConversation();
  watch(turn, view);
  setState("connecting", "Connecting…");
  if (!focused.isConnected) stop.focus({ preventScroll: true }); // a button of a turn that is no more
  follower.begin();
  post(running);
}

async function post(answer) {
  let url;
  try {
    url = await beginStream(messagesOf(conversation, settings.maxMessage));
  } catch (refusal) {
    if (running === answer) finish("error", words.refused(refusal, navigator.onLine));
    return;
  }
  if (running !== answer) {
    stopStream(url); // stopped before the server had said yes
    return;
  }
  answer.turn.url = url;
  own = url;
  save();
  attach();
}

// Keeps an eye on an answer until its end.
function watch(turn, view) {
  running = { turn, view, stream: null, shown: null };
  clearInterval(ticking);
  ticking = setInterval(tick, TICK_MS);
}

function attach() {
  const { turn } = running;
  running.stream = new AnswerStream({
    url: turn.url,
    lastId: turn.lastId,
    heartbeatS: settings.heartbeatS,
    listener: LISTENER,
  });
}

const LISTENER = {
  opened() {
    setState(...progress(running.turn));
  },
  lost() {
    setState("reconnecting", words.reconnecting(navigator.onLine));
  },
  heard(id) {
    running.turn.lastId = id;
  },
  started(model) {
    showModel(model);
  },
  token(text) {
    const { turn, view } = running;
    turn.tokens += 1;
    turn.answer += text;
    turn.left = false; // it was not stopped, after all
    view.addToken(text);
    began();
  },
  reasoning(text) {
    const { turn, view } = running;
    turn.reasoning += text;
    view.addReasoning(text);
    began();
  },
  usage(usage) {
    running.turn.usage = usage;
    showModel(usage.model);
  },
  ended(end) {
    const { tokens, usage, beganAt, left } = running.turn;
    if (left && (end.kind === "failed" || usage.finish_reason === "cancelled")) {
      finish("stopped", words.LEFT);
    } else if (end.kind === "failed") {
      finish("error", words.failure(end, tokens, navigator.onLine));
    } else if (usage.finish_reason === "cancelled") {
      finish("stopped", words.stopped(tokens)); // stopped, but not by this page
    } else {
      finish("done", words.done(usage.tokens ?? tokens, usage.duration_ms ?? Date.now() - beganAt, usage.finish_reason));
    }
  },
};

function began() {
  const { turn } = running;
  turn.firstAt ??= Date.now();
  const [state, sentence] = progress(turn);
  if (status.textContent !== sentence) setState(state, sentence);
}

function progress({ tokens, reasoning }) {
  if (tokens > 0) return ["generating", "Generating…"];
  if (reasoning !== "") return ["generating", "Reasoning…"];
  return ["waiting", "Waiting for the first token…"];
}

function tick() {
  const { stream, view, turn } = running;
  // Frames may not come (a hidden tab, a covered window), and then what waits for one would be held back until the end.
  view.flush();
  showFigures(turn);
  if (performance.now() - savedAt > SAVE_MS) save();
  stream?.check(); // last, since it may be the end
}

// ---- ending

function stopAnswer(sentence = words.stopped(running.turn.tokens)) {
  const { stream, turn } = running;
  stream?.close();
  if (turn.url !== "") stopStream(turn.url);
  finish("stopped", sentence);
}

function finish(state, sentence) {
  const { turn, view } = running;
  running = null;
  clearInterval(ticking);
  Object.assign(turn, { state, sentence, url: "", endedAt: Date.now() });
  view.end();
  save();
  setState(state, sentence);
  showFigures(turn);
  follower.grown();
  follower.end();
}

function save() {
  savedAt = performance.now();
  history.save(conversation);
}

// ---- conversations

function addView(turn) {
  const view = new TurnView(turn, settings.maxMessage, {
    grown: () => follower.grown(),
    edited: (self, text) => begin(text, views.indexOf(self)),
    regenerate: (self) => begin(turn.question, views.indexOf(self)),
  });
  view.appendTo(element("conversation"));
  views.push(view);
  return view;
}

// Takes away the turns from that one on.
function cut(place) {
  conversation.turns.length = place;
  for (const view of views.splice(place)) view.remove();
}

// Puts another conversation on the page, and goes on with its last answer where that is still under way.
function turnTo(other) {
  if (running !== null) stopAnswer(words.TURNED_AWAY);
  cut(0);
  conversation = other;
  history.current = other.id;
  other.turns.forEach(addView);
  showConversation();
  resume();
  follower.begin();
  if (running === null) follower.end();
}

function resume() {
  const turn = conversation.turns.at(-1);
  showModel(settings.model);
  showModel(turn?.model);
  showFigures(turn);
  if (turn?.state !== "running") {
    setState(turn?.state ?? "idle", turn?.sentence ?? "Ready");
    return;
  }
  watch(turn, views.at(-1));
  if (turn.url === "") {
    finish("error", words.NOT_BEGUN);
  } else {
    setState("reconnecting", words.reconnecting(navigator.onLine));
    attach();
  }
}

function newChat() {
  turnTo(newConversation());
  question.focus({ preventScroll: true });
}

// ---- showing

function setState(state, sentence) {
  const focused = document.activeElement;
  const turn = conversation.turns.at(-1);
  const underWay = running !== null;
  page.dataset.state = state;
  page.dataset.finish = state === "done" ? (turn?.usage.finish_reason ?? "") : "";
  ask.hidden = underWay;
  stop.hidden = !underWay;
  retry.hidden = state !== "error" && state !== "stopped";
  // The only words that a screen reader hears unasked: a state, never a token.
  status.textContent = sentence;
  // A control that goes away must not take the keyboard's place in the page with it.
  if (focused !== document.body && (focused.disabled || focused.getClientRects().length === 0)) {
    (underWay ? stop : question).focus({ preventScroll: true });
  }
}

function showConversation() {
  const empty = conversation.turns.length === 0;
  element("welcome").hidden = !empty;
  element("conversation").hidden = empty;
}

function showModel(model) {
  if (typeof model !== "string" || model === "") return;
  if (running !== null) running.turn.model = model;
  element("model").textContent = model;
  element("model").title = model; // a long name is cut on a narrow screen
}

// ---- the controls

field.onSubmit(
  element("composer"),
  (text) => {
    if (running !== null) return; // what is typed meanwhile is kept for the next question
    question.value = "";
    field.check();
    begin(text);
  },
  (found) => {
    fault = found;
    status.textContent = found;
  },
);
question.addEventListener("input", () => {
  if (fault === "" || status.textContent !== fault) return;
  if (running !== null) setState(...progress(running.turn));
  else setState(page.dataset.state, conversation.turns.at(-1)?.sentence ?? "Ready");
});
stop.addEventListener("click", ({ detail }) => {
  // Stop stands where Ask was, under the second half of a double click.
  if (detail < 2 || Date.now() - running.turn.beganAt > DOUBLE_CLICK_MS) stopAnswer();
});
retry.addEventListener("click", () => {
  const place = conversation.turns.length - 1;
  begin(conversation.turns[place].question, place);
});
addEventListener("keydown", (event) => {
  if (event.isComposing) return;
  if (event.key === "Escape" && running !== null && !element("chats").open) {
    stopAnswer();
  } else if (event.code === "KeyO" && event.shiftKey && (event.ctrlKey || event.metaKey)) {
    event.preventDefault();
    element("chats").close();
    newChat();
  }
});
element("new-chat").addEventListener("click", newChat);
element("follow").addEventListener("click", () => {
  follower.begin();
  stop.focus({ preventScroll: true });
});
new ChatList(history, {
  chosen(id) {
    const chosen = history.load(id);
    if (chosen !== null && id !== conversation.id) turnTo(chosen);
  },
  removed(id) {
    if (id === conversation.id) turnTo(newConversation());
    history.remove(id);
  },
});

// ---- coming and going

// A page that is left wants no more of the answer, and says so. But a reloaded one goes on reading it, and so may one
// that cannot tell; then the server waits for a moment, and stops the model if nobody comes.
onLeaving({
  left() {
    if (running !== null && running.turn.url !== "" && running.turn.url === own) {
      // Whether this arrives nobody can know: what took this page's place may be the browser's own "no connection".
      // So the answer is not called stopped here. Whoever comes back asks the server what became of it.
      stopStream(own);
      running.turn.left = true;
    }
    pause();
  },
  paused: pause,
  back() {
    own = history.takeOwn();
    if (running !== null && running.turn.url !== "") attach();
  },
});

function pause() {
  if (running === null) return;
  running.stream?.close();
  history.leaveOwn(own);
  save();
}

addEventListener("visibilitychange", () => {
  if (document.hidden && running !== null) save();
});
addEventListener("pageshow", () => field.check()); // browsers put typed text back without an input event
for (const change of ["online", "offline"]) {
  addEventListener(change, () => {
    if (page.dataset.state === "reconnecting") setState("reconnecting", words.reconnecting(navigator.onLine));
  });
}

// Another tab has gone on with this conversation: so does this one, as soon as there is a stream to follow.
history.watch(() => {
  const stored = history.load(conversation.id);
  if (stored === null && running !== null && running.turn.url === own) {
    stopAnswer(words.REMOVED); // who takes a chat away wants no more of it
    return;
  }
  const last = stored?.turns.at(-1);
  const ready = last !== undefined && (last.state !== "running" || last.url !== "");
  if (running === null && ready && stored.revision !== conversation.revision) turnTo(stored);
});

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
turnTo(history.load(history.current) ?? newConversation());
field.check();
