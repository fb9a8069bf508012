// Makes the children of an element equal to wanted ones by as few changes as it can, so that a rendering that is
// replaced many times a second keeps the reader's selection, focus and place in a table.

// Children before `first` are left alone; a null `first` means that all of the wanted nodes come after those there are.
export function morph(parent, first, wanted) {
  let have = first;
  for (const want of [...wanted.childNodes]) {
    if (have === null) {
      parent.append(want);
    } else if (have.nodeName !== want.nodeName) {
      const next = have.nextSibling;
      have.replaceWith(want);
      have = next;
    } else {
      if (have instanceof Text) rewrite(have, want.data);
      else if (have.nodeName !== "BUTTON") renew(have, want); // "Copied" is not to be unsaid by the next token
      have = have.nextSibling;
    }
  }
  while (have !== null) {
    const next = have.nextSibling;
    have.remove();
    have = next;
  }
}

function rewrite(text, data) {
  if (text.data === data) return;
  if (data.startsWith(text.data)) text.appendData(data.slice(text.length)); // which costs only what is new
  else text.data = data;
}

function renew(have, want) {
  for (const { name } of [...have.attributes]) if (!want.hasAttribute(name)) have.removeAttribute(name);
  for (const { name, value } of want.attributes) if (have.getAttribute(name) !== value) have.setAttribute(name, value);
  morph(have, have.firstChild, want);
}
