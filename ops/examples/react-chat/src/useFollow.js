import { useEffect, useLayoutEffect, useRef } from "react";

const NEAR_PX = 48; // closer to the end than this is at the end

const isAtEnd = () => innerHeight + scrollY >= document.documentElement.scrollHeight - NEAR_PX;

// Keeps the end of the page in view while `content` grows, unless its reader has scrolled away from it.
export function useFollow(content) {
  const following = useRef(true);

  useEffect(() => {
    const look = () => {
      following.current = isAtEnd();
    };
    addEventListener("scroll", look, { passive: true });
    return () => removeEventListener("scroll", look);
  }, []);

  useLayoutEffect(() => {
    if (following.current) scrollTo({ top: document.documentElement.scrollHeight, behavior: "instant" });
  }, [content]);
}
