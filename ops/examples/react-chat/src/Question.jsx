import { useRef, useState } from "react";

export function Question({ running, onAsk, onStop }) {
  const [text, setText] = useState("");
  const field = useRef(null);

  const submit = (event) => {
    event.preventDefault();
    if (running || !text.trim()) return;
    onAsk(text);
    setText("");
    field.current.focus(); // or it would be lost with the button that was pressed
  };
  const stop = () => {
    onStop();
    field.current.focus();
  };
  // Enter sends, Shift+Enter is a new line; the Enter that ends an input method's composition does neither.
  const onKeyDown = (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.nativeEvent.isComposing) submit(event);
  };

  return (
    <form className="question" onSubmit={submit}>
      <label htmlFor="question">Your question</label>
      <textarea
        id="question"
        ref={field}
        rows={2}
        autoFocus
        value={text}
        onChange={(event) => setText(event.target.value)}
        onKeyDown={onKeyDown}
      />
      {running ? (
        <button type="button" key="stop" onClick={stop}>
          Stop
        </button>
      ) : (
        <button type="submit" key="ask" disabled={!text.trim()}>
          Ask
        </button>
      )}
    </form>
  );
}
