// Whether this page goes away for good, as far as a browser tells.

// pageswap comes before pagehide, and only where something else takes the page's place: it names what, if that is of the
// same origin. A reload by the browser's own button is told here and nowhere else (the Navigation API's "navigate" event
// is not fired for it). Firefox has no such event: there, leaving and reloading look the same.
const canTell = "onpageswap" in window;

// Calls left() when the page is left for another one or its tab closes, paused() when it is reloaded or that cannot be
// told apart, and back() when the browser brings it back as it was (bfcache).
export function onLeaving({ left, paused, back }) {
  let returns = false;
  addEventListener("pageswap", ({ activation }) => {
    const next = activation?.entry?.url;
    returns = typeof next === "string" && new URL(next).pathname === location.pathname;
  });
  addEventListener("pagehide", () => (canTell && !returns ? left() : paused()));
  addEventListener("pageshow", ({ persisted }) => {
    returns = false;
    if (persisted) back();
  });
}
