// Copying, and a button that says how it went. The clipboard is missing on plain http but for this machine's own.

const SHOWN_MS = 2000;

export const canCopy = navigator.clipboard !== undefined;

export async function copyFrom(button, text) {
  let said = "Copied";
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    said = "Could not copy";
  }
  button.textContent = said;
  setTimeout(() => {
    if (button.textContent === said) button.textContent = "Copy";
  }, SHOWN_MS);
}
