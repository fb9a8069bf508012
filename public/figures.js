// The figures below the conversation: how much, how fast. They are about its latest answer.

import * as words from "/words.js";

const element = (id) => document.getElementById(id);

export function showFigures(turn) {
  const { beganAt, firstAt, endedAt, usage } = turn ?? {};
  // The server's figures where it has given them, since it sits nearer to the model; until then our own.
  const count = usage?.tokens ?? turn?.tokens ?? 0;
  const ended = turn === undefined || endedAt !== null;
  element("stats").hidden = ended && count === 0; // nothing came: there is nothing to measure
  if (element("stats").hidden) return;
  const durationMs = usage.duration_ms ?? (endedAt ?? Date.now()) - beganAt;
  const ttftMs = usage.ttft_ms ?? (firstAt === null ? null : firstAt - beganAt);
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
