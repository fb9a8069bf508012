// Text that grows by tokens: cheap for a long answer, complete in a hidden tab, and inert whatever the model writes.

// A block as long as this is closed at its next newline, so that the browser lays out one block a frame, not the answer.
const BLOCK_CHARS = 2000;

export class GrowingText {
  #element;
  #onGrown;
  #tail = null; // the Text node that grows
  #waiting = "";
  #frame = 0;

  // onGrown() runs after each batch of tokens has been put into the element.
  constructor(element, onGrown = () => {}) {
    this.#element = element;
    this.#onGrown = onGrown;
  }

  // Tokens wait for the next frame, so that any number of them costs one layout. A hidden page draws no frames.
  append(text) {
    this.#waiting += text;
    if (document.hidden) this.flush();
    else if (this.#frame === 0) this.#frame = requestAnimationFrame(() => this.flush());
  }

  // Shows what waits, now: at the end of an answer, and now and then where frames do not come.
  flush() {
    cancelAnimationFrame(this.#frame);
    this.#frame = 0;
    if (this.#waiting === "") return;
    this.#write(this.#waiting);
    this.#waiting = "";
    this.#onGrown();
  }

  // Under `white-space: pre-wrap` a newline that ends a block shows no line of its own: blocks look as one text does.
  #write(text) {
    while (text !== "") {
      if (this.#tail === null) this.#openBlock();
      const room = Math.max(0, BLOCK_CHARS - this.#tail.length);
      const end = text.indexOf("\n", room) + 1;
      if (end === 0) {
        this.#tail.appendData(text);
        return;
      }
      this.#tail.appendData(text.slice(0, end));
      this.#tail = null;
      text = text.slice(end);
    }
  }

  #openBlock() {
    const block = document.createElement("div");
    this.#tail = document.createTextNode("");
    block.append(this.#tail);
    this.#element.append(block);
  }
}
