// HTML to DOM with nothing in it that could run, load, submit or disguise itself: an allow-list of what Markdown makes.

import DOMPurify from "/vendor/purify.js";

// No images: a model that was talked into it would send a secret away in an image's address, without any click.
const TAGS =
  "a blockquote br code del em h1 h2 h3 h4 h5 h6 hr kbd li ol p pre strong sub sup table tbody td th thead tr ul";
const ATTRIBUTES = ["href", "title", "align", "start", "data-lang"];

const LINK = /^(?:https?:\/\/|mailto:)/i;

DOMPurify.setConfig({
  ALLOWED_TAGS: TAGS.split(" "),
  ALLOWED_ATTR: ATTRIBUTES,
  ALLOW_DATA_ATTR: false,
  ALLOW_ARIA_ATTR: false,
  RETURN_DOM_FRAGMENT: true,
});

DOMPurify.addHook("afterSanitizeAttributes", (node) => {
  if (node.nodeName !== "A") return;
  // A relative link would lead to some place of this very server that the model made up.
  if (!LINK.test(node.getAttribute("href") ?? "")) {
    node.removeAttribute("href");
  } else {
    node.setAttribute("target", "_blank");
    node.setAttribute("rel", "noopener noreferrer nofollow");
  }
});

export const sanitise = (html) => DOMPurify.sanitize(html);
