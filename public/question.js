// A field in which a question is written: how long that may be, and that Enter sends it.

import * as words from "/words.js";

export class QuestionField {
  #field;
  #note;
  #button;
  #max;

  // `note` says how much room is left, once that matters; `button` is disabled while there is nothing to send.
  constructor(field, note, button, max) {
    this.#field = field;
    this.#note = note;
    this.#button = button;
    this.#max = max;
    field.addEventListener("input", () => this.check());
  }

  // Looks at the field; returns what is wrong with it, or "".
  check() {
    const length = words.countCodePoints(this.#field.value.trim());
    const fault = words.tooLong(length, this.#max);
    const near = length > this.#max * 0.8;
    this.#note.textContent = fault || (near ? `${length.toLocaleString("en")} of ${this.#max.toLocaleString("en")}` : "");
    this.#field.setAttribute("aria-invalid", String(fault !== ""));
    this.#button.disabled = length === 0 || fault !== "";
    return fault;
  }

  // Hands over the trimmed text at Enter or when the form is submitted; or to `refuse` what is wrong with it.
  onSubmit(form, send, refuse = () => {}) {
    const submit = () => {
      const fault = this.check();
      if (fault !== "") refuse(fault);
      else if (!this.#button.disabled) send(this.#field.value.trim());
    };
    this.#field.addEventListener("keydown", (event) => {
      // Enter also confirms what an input method composes (keyCode 229 is how older Safari tells), and then sends nothing.
      if (event.key !== "Enter" || event.shiftKey || event.isComposing || event.keyCode === 229) return;
      event.preventDefault();
      if (!event.repeat) submit(); // a key held down sends once
    });
    form.addEventListener("submit", (event) => {
      event.preventDefault();
      submit();
    });
  }
}
