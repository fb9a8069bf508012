// A turn of the conversation on the page: the question, its editor, the answer as it grows, and their buttons.

import { copyFrom } from "/clipboard.js";
import { QuestionField } from "/question.js";
import { MarkdownText } from "/markdown.js";
import { GrowingText } from "/text.js";

export class TurnView {
  #turn;
  #nodes;
  #question;
  #reply;
  #answer;
  #reasoning;

  // `grown` is called whenever the turn has become longer; `edited` with this view and a new question; `regenerate`
  // with this view.
  constructor(turn, maxMessage, { grown, edited, regenerate }) {
    this.#turn = turn;
    const fragment = document.getElementById("turn-template").content.cloneNode(true);
    this.#nodes = [...fragment.children];
    [this.#question, this.#reply] = this.#nodes.map((node) => node.querySelector("article"));
    this.#answer = new MarkdownText(this.#reply.querySelector(".answer"), grown);
    this.#reasoning = new GrowingText(this.#reply.querySelector(".reasoning-text"), grown);

    this.#question.querySelector(".asked").textContent = turn.question;
    this.#listen(this.#question, ".copy", ({ target }) => copyFrom(target, turn.question));
    this.#listen(this.#reply, ".copy", ({ target }) => copyFrom(target, turn.answer));
    this.#listen(this.#reply, ".regenerate", () => regenerate(this));
    this.#reply.querySelector(".answer").addEventListener("click", copyCode);
    this.#prepareEditor(maxMessage, (question) => edited(this, question));

    if (turn.reasoning !== "") this.#showReasoning(turn.reasoning);
    if (turn.answer !== "") this.#answer.append(turn.answer);
    if (turn.state === "running") this.#showBusy(true);
    else this.end();
  }

  appendTo(list) {
    list.append(...this.#nodes);
  }

  remove() {
    for (const node of this.#nodes) node.remove();
  }

  // ---- while it is written

  addToken(text) {
    this.#answer.append(text);
  }

  addReasoning(text) {
    this.#showReasoning(text);
  }

  flush() {
    this.#answer.flush();
    this.#reasoning.flush();
  }

  // No more comes: shows all there is, and why that may be less than all.
  end() {
    this.#reasoning.flush();
    this.#answer.end();
    this.#showBusy(false);
    const { state, sentence, answer } = this.#turn;
    const note = this.#reply.querySelector(".note");
    note.textContent = sentence;
    note.hidden = state === "done";
    this.#reply.querySelector(".tools").hidden = false;
    this.#reply.querySelector(".copy").hidden = answer === "";
  }

  #showBusy(busy) {
    this.#reply.setAttribute("aria-busy", String(busy));
  }

  #showReasoning(text) {
    this.#reply.querySelector(".reasoning").hidden = false;
    this.#reasoning.append(text);
  }

  // ---- the editor

  #prepareEditor(maxMessage, send) {
    const editor = this.#question.querySelector(".editor");
    const field = editor.querySelector("textarea");
    const [note, button] = [".editor-limit", ".editor-send"].map((selector) => editor.querySelector(selector));
    const limit = new QuestionField(field, note, button, maxMessage);
    const show = (editing) => {
      editor.hidden = !editing;
      this.#question.querySelector(".asked").hidden = editing;
      this.#question.querySelector(":scope > .tools").hidden = editing;
    };
    const cancel = () => {
      show(false);
      this.#question.querySelector(".edit").focus({ preventScroll: true });
    };
    this.#listen(this.#question, ".edit", () => {
      show(true);
      field.value = this.#turn.question;
      limit.check();
      field.focus();
      field.setSelectionRange(field.value.length, field.value.length);
    });
    this.#listen(this.#question, ".editor-cancel", cancel);
    field.addEventListener("keydown", (event) => {
      if (event.key !== "Escape" || event.isComposing) return;
      event.stopPropagation(); // Esc leaves the editor, and stops no answer
      cancel();
    });
    limit.onSubmit(editor, (question) => {
      show(false);
      send(question);
    });
  }

  #listen(article, selector, handle) {
    article.querySelector(selector).addEventListener("click", handle);
  }
}

function copyCode({ target }) {
  const button = target.closest(".copy-code");
  if (button === null) return;
  copyFrom(button, button.closest(".code").querySelector("code").textContent);
}
