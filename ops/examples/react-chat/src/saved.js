// The conversation of this tab, in the tab's own storage: a reload keeps it, and no other tab shares its answer.

import { generateId } from "ai";

const KEY = "sluice.react-chat";

export const newConversation = () => ({ id: generateId(), messages: [], running: false });

export function loadConversation() {
  try {
    return JSON.parse(sessionStorage.getItem(KEY)) ?? newConversation();
  } catch {
    return newConversation(); // storage is forbidden, or what is in it is not ours
  }
}

// `running` says that an answer was under way, which a reload then resumes.
export function saveConversation({ id, messages, running }) {
  try {
    sessionStorage.setItem(KEY, JSON.stringify({ id, messages, running }));
  } catch {
    // full or forbidden: the page works on, and a reload begins anew
  }
}
