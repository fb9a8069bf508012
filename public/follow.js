// Keeps the end of a growing page in view, until the reader scrolls up.

const NOISE_PX = 2; // fractions that zoomed pages report; anything more upwards was the reader
const END_PX = 24; // this near to the end counts as back at the end

export class EndFollower {
  #page = document.scrollingElement;
  #button;
  #following = true;
  #active = false;
  #lastTop = 0;

  // The button is shown while an answer grows out of sight, for whoever wires it to begin().
  constructor(button) {
    this.#button = button;
    addEventListener("scroll", () => this.#onScroll(), { passive: true });
    // A wheel is heard before the page has moved: without this the next token would pull the reader down once more.
    addEventListener(
      "wheel",
      (event) => {
        if (event.deltaY < 0 && !event.ctrlKey && this.#page.scrollTop > 0) this.#set(false);
      },
      { passive: true },
    );
    // A finger that moves slowly scrolls by less at a time than counts as a scroll: it is heard itself.
    let touchedAt = 0;
    addEventListener("touchstart", ({ touches }) => (touchedAt = touches[0].clientY), { passive: true });
    addEventListener(
      "touchmove",
      ({ touches }) => {
        const down = touches[0].clientY - touchedAt;
        if (touches.length === 1 && down > NOISE_PX && this.#page.scrollTop > 0) this.#set(false);
      },
      { passive: true },
    );
  }

  begin() {
    this.#active = true;
    this.#set(true);
    this.grown();
  }

  end() {
    this.#active = false;
    this.#set(this.#following);
  }

  // To be called after the page has grown.
  grown() {
    if (!this.#active || !this.#following) return;
    this.#page.scrollTop = this.#page.scrollHeight;
    this.#lastTop = this.#page.scrollTop;
  }

  #onScroll() {
    const top = this.#page.scrollTop;
    const toEnd = this.#page.scrollHeight - this.#page.clientHeight - top;
    // A page that got shorter, or a window that got taller, moves up too, but stays at the end.
    if (top < this.#lastTop - NOISE_PX && toEnd > NOISE_PX) this.#set(false);
    else if (top > this.#lastTop && toEnd <= END_PX) this.#set(true);
    this.#lastTop = top;
  }

  #set(following) {
    this.#following = following;
    this.#button.hidden = following || !this.#active;
  }
}
