// The list of this browser's conversations: to go back to one, or to delete it.

const element = (id) => document.getElementById(id);
const DAY = new Intl.DateTimeFormat(undefined, { dateStyle: "medium", timeStyle: "short" });

export class ChatList {
  #history;
  #chosen;
  #removed;

  // `chosen` and `removed` are called with a conversation's id.
  constructor(history, { chosen, removed }) {
    this.#history = history;
    this.#chosen = chosen;
    this.#removed = removed;
    element("chats-open").addEventListener("click", () => {
      this.#fill();
      element("chats").showModal();
    });
    element("chats").addEventListener("click", ({ target }) => {
      if (target === element("chats")) element("chats").close(); // beside the box, on what it covers
    });
  }

  #fill() {
    const entries = this.#history.list();
    element("chats-list").replaceChildren(...entries.map((entry) => this.#row(entry)));
    element("chats-none").hidden = entries.length > 0;
  }

  #row({ id, title, at }) {
    const row = document.createElement("li");
    const open = document.createElement("button");
    open.type = "button";
    open.className = "chat-open";
    const name = document.createElement("span");
    name.textContent = title;
    const when = document.createElement("small");
    when.textContent = DAY.format(at);
    open.append(name, " ", when);
    if (id === this.#history.current) open.setAttribute("aria-current", "true");
    open.addEventListener("click", () => {
      element("chats").close();
      this.#chosen(id);
    });
    row.append(open, this.#deleteButton(id, title));
    return row;
  }

  // Nothing brings a deleted chat back: it takes a second press, on the same button.
  #deleteButton(id, title) {
    const button = document.createElement("button");
    button.type = "button";
    button.className = "chat-delete";
    const label = (word) => {
      button.textContent = word;
      button.setAttribute("aria-label", `${word} “${title}”`);
    };
    label("Delete");
    button.addEventListener("click", () => {
      if (button.textContent === "Delete") {
        label("Really delete");
        return;
      }
      this.#removed(id);
      this.#fill();
      element("chats").querySelector("button").focus(); // the pressed one is gone
    });
    button.addEventListener("blur", () => label("Delete"));
    return button;
  }
}
