// Half-written Markdown made whole for the moment, so that a bold word does not begin its life as two asterisks.
// Pure, and only for the eye: at the end of an answer its text is rendered as it stands.

const FENCE = /^[ \t]*(?:(?:[-*+>]|\d{1,9}[.)])[ \t]+)*(`{3,}|~{3,})(.*)$/;

// A line under way that holds only markers has not yet said what it will be: "-" may become an item, a rule, or turn
// the line above it into a heading.
const ONLY_MARKERS = /(?:^|\n)[ \t]*(?:\d{1,9}[.)])?[-=*+#>~`_|: \t]*$/;
const ONLY_FENCE = /\n[ \t]*(?:`+|~+)$/;

// Where a line begins a block of its own, and how long its marker is.
const MARKER = /^[ \t]*(?:(?:[-*+>]|#{1,6}|\d{1,9}[.)])[ \t]+)+/;

// What may stand behind "[text]" while its link is not complete: "(", an address, the beginning of a title.
const HALF_ADDRESS = /^\([^\s()]*(?:\([^\s()]*\)?[^\s()]*)?(?:\s+["'][^"'\n]*)?$/;

// Nobody emphasises in so many layers: these are asterisks that mean something else, and closing them all would nest as
// many elements.
const MAX_OPEN = 6;

export function mend(source) {
  if (endsInFence(source)) return source.replace(ONLY_FENCE, "\n");
  const shown = source.replace(ONLY_MARKERS, (line) => (line.startsWith("\n") ? "\n" : ""));
  const start = startOfLastRun(shown);
  return shown.slice(0, start) + closeInline(shown.slice(start));
}

function endsInFence(source) {
  let open = "";
  for (const line of source.split("\n")) {
    const fence = FENCE.exec(line);
    if (fence === null) continue;
    const [, mark, rest] = fence;
    if (open === "") {
      if (mark[0] === "~" || !rest.includes("`")) open = mark;
    } else if (mark.startsWith(open) && rest.trim() === "") {
      open = "";
    }
  }
  return open !== "";
}

// Emphasis and links never reach over a blank line or into the next item, heading or cell.
function startOfLastRun(source) {
  let end = source.endsWith("\n") ? source.length - 1 : source.length;
  for (;;) {
    const start = source.lastIndexOf("\n", end - 1) + 1;
    const line = source.slice(start, end);
    if (line.trim() === "") return end;
    const marker = MARKER.exec(line);
    if (marker !== null) return start + marker[0].length;
    if (line.trimStart().startsWith("|")) return start + line.lastIndexOf("|") + 1;
    if (start === 0) return 0;
    end = start - 1;
  }
}

// Closes what is open at the end of one run of text, and takes back an opening with nothing behind it.
function closeInline(run) {
  const text = run.trimEnd();
  const open = []; // markers of emphasis that wait for their end
  const brackets = []; // where each "[" stands
  let cut = text.length; // what stands behind it is half a marker
  let at = 0;
  while (at < cut) {
    const character = text[at];
    if (character === "\\") {
      at += 2;
    } else if (character === "`") {
      const ticks = /^`+/.exec(text.slice(at))[0];
      const close = endOfCode(text, at + ticks.length, ticks);
      if (close >= 0) {
        at = close;
      } else if (at + ticks.length === text.length) {
        cut = at;
      } else {
        const inside = text.slice(at + ticks.length).replace(/`+$/, "");
        return finish(text.slice(0, at) + ticks + inside + ticks, open);
      }
    } else if (character === "*" || character === "_" || character === "~") {
      const length = new RegExp(`^\\${character}+`).exec(text.slice(at))[0].length;
      const last = at + length === text.length;
      const left = emphasise(text, at, length, open);
      if (last && left > 0) cut = text.length - left;
      at += length;
    } else if (character === "[") {
      brackets.push(text[at - 1] === "!" ? at - 1 : at);
      at += 1;
    } else if (character === "]" && brackets.length > 0) {
      const start = brackets.pop();
      at += 1;
      if (text[at] !== "(") continue;
      if (HALF_ADDRESS.test(text.slice(at))) {
        const label = text.slice(text.indexOf("[", start) + 1, at - 1);
        return finish(text.slice(0, start) + label, open); // half an address is nothing to look at
      }
    } else {
      at += 1;
    }
  }
  if (open.length > MAX_OPEN || (open.length === 0 && cut === text.length)) return run;
  return finish(text.slice(0, cut).trimEnd(), open);
}

const finish = (text, open) => (text.trim() === "" ? text : text + open.reverse().join(""));

function endOfCode(text, from, ticks) {
  for (const match of text.slice(from).matchAll(/`+/g)) {
    if (match[0].length === ticks.length) return from + match.index + ticks.length;
  }
  return -1;
}

// Takes one run of "*", "_" or "~" into account; returns how many of its characters are of no use as yet.
function emphasise(text, at, length, open) {
  const character = text[at];
  const before = text[at - 1] ?? " ";
  const after = text[at + length] ?? " ";
  let left = length;
  if (!/\s/.test(before)) {
    while (left > 0 && open.at(-1)?.[0] === character && open.at(-1).length <= left) left -= open.pop().length;
  }
  const opens = !/\s/.test(after) && !(character === "_" && /\w/.test(before));
  if (left > 0 && opens) {
    if (character === "~") {
      if (left === 2) open.push("~~");
    } else {
      if (left >= 2) open.push(character.repeat(2));
      if (left % 2 === 1) open.push(character);
    }
    return 0;
  }
  return left;
}
