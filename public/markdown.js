// Markdown as it is written: what is complete is rendered once and kept, only the block under way is rendered again.

import { mend } from "/mend.js";
import { morph } from "/morph.js";
import { sanitise } from "/sanitise.js";
import { Marked } from "/vendor/marked.js";

// A rendering that took long (one block of many pages) rests so many times as long before the next: the page stays usable.
const REST = 4;

const INLINE_TAG = /^<(?:br\s*\/?|\/?(?:kbd|sub|sup))>/i;

const escape = (text) => text.replace(/[&<>"']/g, (character) => `&#${character.charCodeAt(0)};`);

// A model's HTML is text, but for a few harmless tags that stand in for what Markdown lacks. So DOMPurify, which has the
// last word, has hardly anything to do.
const marked = new Marked({
  breaks: true, // models end the lines of a poem with a single newline
  tokenizer: {
    html: () => undefined,
    tag(source) {
      const match = INLINE_TAG.exec(source);
      if (match === null) return undefined;
      const [raw] = match;
      return { type: "html", raw, text: raw, block: false, inLink: this.lexer.state.inLink, inRawBlock: false };
    },
  },
  renderer: {
    code: ({ text, lang }) => {
      const language = /^\S*/.exec(lang ?? "")[0];
      return `<pre data-lang="${escape(language)}"><code>${escape(text)}</code></pre>`;
    },
    heading({ tokens, depth }) {
      const level = Math.min(depth + 2, 6); // the page's own headings are above: its name, and who speaks
      return `<h${level}>${this.parser.parseInline(tokens)}</h${level}>`;
    },
    image: ({ text, href }) => escape(text || href),
    checkbox: ({ checked }) => (checked ? "☑ " : "☐ "),
  },
});

export class MarkdownText {
  #element;
  #onGrown;
  #source = "";
  #open = ""; // the end of the source that may yet change its meaning
  #lastKept = null; // the last node that stays as it is
  #links = {}; // the addresses that "[name]: address" has given so far
  #stale = false; // there is text that is not shown yet
  #frame = 0;
  #dueAt = 0; // ms, before which nothing is rendered

  // onGrown() runs after each change of the element.
  constructor(element, onGrown = () => {}) {
    this.#element = element;
    this.#onGrown = onGrown;
  }

  // Tokens wait for the next frame, so that any number of them costs one rendering.
  append(text) {
    this.#source += text;
    this.#open += text;
    this.#stale = true;
    this.#ask();
  }

  // Shows what waits, now: where frames do not come (a hidden tab, a covered window), somebody has to ask.
  flush() {
    if (this.#stale && performance.now() >= this.#dueAt) this.#render(mend);
  }

  // The text is complete: it means what it says.
  end() {
    cancelAnimationFrame(this.#frame);
    this.#frame = 0;
    if (Object.keys(this.#links).length > 0 || /^ {0,3}\[[^\]\n]+\]:/m.test(this.#open)) {
      // What was kept may have used a name before its address came.
      this.#open = this.#source;
      this.#lastKept = null;
      this.#links = {};
    }
    this.#render((source) => source);
  }

  #ask() {
    if (this.#frame !== 0) return;
    this.#frame = requestAnimationFrame(() => {
      this.#frame = 0;
      this.flush();
      if (this.#stale) this.#ask();
    });
  }

  #render(view) {
    const beganAt = performance.now();
    this.#stale = false;
    // A lone CR at the end may be the first half of a CRLF.
    this.#open = this.#open.replace(/\r\n|\r(?!$)/g, "\n");
    const wanted = document.createDocumentFragment();
    let kept = 0;
    try {
      this.#keep(wanted);
      kept = wanted.childNodes.length;
      wanted.append(...this.#lex(view(this.#open)).map(render));
    } catch {
      // Nested a thousand deep it is more than the parser's stack holds: then the text is shown as it was written.
      while (wanted.childNodes.length > kept) wanted.lastChild.remove();
      wanted.append(plain(this.#open));
    }
    morph(this.#element, this.#lastKept === null ? this.#element.firstChild : this.#lastKept.nextSibling, wanted);
    for (let count = 0; count < kept; count += 1) {
      this.#lastKept = this.#lastKept === null ? this.#element.firstChild : this.#lastKept.nextSibling;
    }
    this.#onGrown();
    const now = performance.now();
    this.#dueAt = now + REST * (now - beganAt);
  }

  // Renders what no later text can change: all blocks of whole lines but the last. (A list goes on after a blank line,
  // a table or a heading begins as a paragraph, and half a line may yet become anything.)
  #keep(wanted) {
    const lines = this.#open.slice(0, this.#open.lastIndexOf("\n") + 1);
    const tokens = this.#lex(lines);
    const last = tokens.findLastIndex(({ type }) => type !== "space");
    const done = tokens.slice(0, Math.max(last, 0));
    const text = done.map(({ raw }) => raw).join("");
    if (text === "" || !lines.startsWith(text)) return;
    for (const token of done) {
      if (isDefinition(token)) this.#links[token.tag] ??= { href: token.href, title: token.title };
      wanted.append(render(token));
    }
    this.#open = this.#open.slice(text.length);
  }

  #lex(source) {
    const lexer = new marked.Lexer(marked.defaults);
    Object.assign(lexer.tokens.links, this.#links);
    return lexer.lex(source);
  }
}

const isDefinition = ({ type }) => type === "def";

function plain(text) {
  const paragraph = document.createElement("p");
  paragraph.className = "plain";
  paragraph.textContent = text;
  return paragraph;
}

function render(token) {
  const fragment = sanitise(marked.parser([token]));
  for (const node of [...fragment.childNodes]) if (node instanceof Text && node.data.trim() === "") node.remove();
  for (const pre of fragment.querySelectorAll("pre")) pre.replaceWith(codeBlock(pre));
  for (const table of fragment.querySelectorAll("table")) {
    const box = document.createElement("div"); // what scrolls, where a table is wider than the screen
    box.className = "table";
    table.replaceWith(box);
    box.append(table);
  }
  return fragment;
}

function codeBlock(pre) {
  const block = document.getElementById("code-template").content.firstElementChild.cloneNode(true);
  block.querySelector(".code-language").textContent = pre.dataset.lang ?? "";
  block.querySelector("code").textContent = pre.textContent;
  return block;
}
