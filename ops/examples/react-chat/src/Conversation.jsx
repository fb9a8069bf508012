import { useChat } from "@ai-sdk/react";
import { useEffect, useState } from "react";

import { Message } from "./Message.jsx";
import { Question } from "./Question.jsx";
import { saveConversation } from "./saved.js";
import { SluiceTransport, stopAnswer } from "./sluice.js";
import { useFollow } from "./useFollow.js";
import { useReconnect } from "./useReconnect.js";

const RENDER_EVERY_MS = 50; // tokens may come faster than a screen can show them

export function Conversation({ saved, onNew }) {
  const [cutOff, setCutOff] = useState(false); // the connection was lost, and the server has no more of it
  const [stopped, setStopped] = useState(false);
  const [transport] = useState(() => new SluiceTransport({ onGone: () => setCutOff(true) }));

  const { id, messages, status, error, sendMessage, regenerate, stop, resumeStream, clearError } = useChat({
    id: saved.id,
    messages: saved.messages,
    resume: saved.running,
    transport,
    throttle: RENDER_EVERY_MS,
  });
  const reconnecting = useReconnect({ status, error, resumeStream });
  const running = status === "submitted" || status === "streaming" || reconnecting;

  useEffect(() => saveConversation({ id, messages, running }), [id, messages, running]);
  useFollow(messages);

  const begin = (ask) => {
    setCutOff(false);
    setStopped(false);
    ask();
  };
  const end = () => {
    setStopped(true);
    stop(); // the page is quiet at once,
    clearError(); // gives up reconnecting if it was at that,
    stopAnswer(id); // and the model stops too
  };
  const leave = () => {
    if (running) end();
    onNew();
  };

  return (
    <>
      <header>
        <h1>Chat</h1>
        <button type="button" onClick={leave}>
          New chat
        </button>
      </header>
      <main>
        <ol className="messages">
          {messages.map((message) => (
            <Message key={message.id} message={message} />
          ))}
        </ol>
        {!running && <Trouble text={troubleOf({ error, cutOff })} onRetry={() => begin(regenerate)} />}
        <p className="status" role="status">
          {statusOf({ status, reconnecting, stopped })}
        </p>
        <Question running={running} onAsk={(text) => begin(() => sendMessage({ text }))} onStop={end} />
      </main>
    </>
  );
}

function Trouble({ text, onRetry }) {
  if (!text) return null;
  return (
    <div className="trouble" role="alert">
      <p>{text}</p>
      <button type="button" onClick={() => onRetry()}>
        Try again
      </button>
    </div>
  );
}

function troubleOf({ error, cutOff }) {
  if (error instanceof TypeError) return "The server cannot be reached."; // the browser's own words are for developers
  if (error) return error.message; // Sluice's, made to be shown
  return cutOff ? "The connection was lost, and the rest of this answer with it." : "";
}

function statusOf({ status, reconnecting, stopped }) {
  if (reconnecting) return "Reconnecting…";
  if (status === "submitted") return "Waiting for the answer…";
  if (status === "streaming") return "Answering…";
  return stopped ? "Stopped." : "";
}
