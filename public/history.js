// The conversations of this browser: one key each and an index in localStorage, and which of them this tab is about.
//
// Several tabs share it. Each change of a conversation's turns gives it a new revision, so that a tab that has been
// overtaken by another one notices: it then keeps its own turns as a conversation of their own, and overwrites nothing.

import { newId, readConversation, titleOf } from "/conversation.js";

const INDEX = "sluice.chats";
const CURRENT = "sluice.chat";
const OWN = "sluice.own";
const keyOf = (id) => `sluice.chat.${id}`;

const MAX_CONVERSATIONS = 50;

// A browser that keeps nothing (private mode, storage switched off) still chats: until the tab closes.
class Shelf {
  #storage;
  #memory = new Map();

  constructor(name) {
    try {
      this.#storage = globalThis[name];
    } catch {
      this.#storage = null;
    }
  }

  get(key) {
    return this.#memory.get(key) ?? this.#storage?.getItem(key) ?? null;
  }

  // Says whether it is kept for good.
  set(key, value) {
    try {
      this.#storage.setItem(key, value);
      this.#memory.delete(key);
      return true;
    } catch {
      this.#memory.set(key, value);
      return false;
    }
  }

  remove(key) {
    this.#memory.delete(key);
    this.#storage?.removeItem(key);
  }
}

export class History {
  #local = new Shelf("localStorage");
  #tab = new Shelf("sessionStorage");

  // What there is, the newest first: {id, title, at}.
  list() {
    const kept = readJson(this.#local.get(INDEX));
    const sound = (entry) => typeof entry?.title === "string" && Number.isFinite(entry.at);
    return Array.isArray(kept) ? kept.filter((entry) => sound(entry) && this.#local.get(keyOf(entry.id)) !== null) : [];
  }

  // The conversation, or null where there is none of that id.
  load(id) {
    return readConversation(readJson(this.#local.get(keyOf(id))));
  }

  // Its turns have changed: one was added, or some were cut off.
  change(conversation) {
    const stored = this.load(conversation.id);
    if (stored !== null && stored.revision !== conversation.revision) {
      conversation.id = newId();
      this.current = conversation.id;
    }
    conversation.revision = newId();
    this.#write(conversation);
  }

  // Its last answer has grown or ended. Where this tab is no longer up to date nothing is written.
  save(conversation) {
    if (this.load(conversation.id)?.revision === conversation.revision) this.#write(conversation);
  }

  remove(id) {
    this.#local.remove(keyOf(id));
    this.#local.set(INDEX, JSON.stringify(this.list().filter((entry) => entry.id !== id)));
  }

  // The id of the conversation that this tab is about, over reloads.
  get current() {
    return this.#tab.get(CURRENT);
  }

  set current(id) {
    this.#tab.set(CURRENT, id);
  }

  // What a page hands on to the one that it is reloaded as, which takes it: a tab that is duplicated meanwhile has none.
  leaveOwn(url) {
    if (url !== null) this.#tab.set(OWN, url);
  }

  takeOwn() {
    const url = this.#tab.get(OWN);
    this.#tab.remove(OWN);
    return url;
  }

  // Calls back when another tab has written or removed that conversation.
  watch(changed) {
    addEventListener("storage", ({ key }) => {
      if (key === keyOf(this.current)) changed();
    });
  }

  #write(conversation) {
    conversation.at = Date.now();
    const { id, at } = conversation;
    const others = this.list().filter((entry) => entry.id !== id);
    for (const { id: old } of others.splice(MAX_CONVERSATIONS - 1)) this.#local.remove(keyOf(old));
    const text = JSON.stringify(conversation);
    // Where there is no more room, the oldest make it.
    while (!this.#local.set(keyOf(id), text) && others.length > 0) this.#local.remove(keyOf(others.pop().id));
    this.#local.set(INDEX, JSON.stringify([{ id, title: titleOf(conversation), at }, ...others]));
  }
}

function readJson(text) {
  try {
    return JSON.parse(text);
  } catch {
    return null;
  }
}
