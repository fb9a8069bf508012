import { useEffect, useRef, useState } from "react";

const PAUSES_MS = [500, 1000, 2000, 4000]; // together longer than Sluice's default grace: later, there is nothing left

// What fetch and a body's reader throw when the network fails; a refusal or an error that the server reports is none.
const isDisconnect = (error) => error instanceof TypeError;

// Resumes an answer whose connection broke, which useChat itself does only when its tab is looked at again.
// True as long as there is hope.
export function useReconnect({ status, error, resumeStream }) {
  const broken = status === "error" && isDisconnect(error);
  const tries = useRef(0);
  const [gaveUp, setGaveUp] = useState(false);

  // Each try that fails is another error object, and so another run of this effect.
  useEffect(() => {
    if (!broken) {
      tries.current = 0;
      setGaveUp(false);
    } else if (tries.current === PAUSES_MS.length) {
      setGaveUp(true);
    } else {
      const timer = setTimeout(resumeStream, PAUSES_MS[tries.current++]);
      return () => clearTimeout(timer);
    }
  }, [broken, error, resumeStream]);

  return broken && !gaveUp;
}
