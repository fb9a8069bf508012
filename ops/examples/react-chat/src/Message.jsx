// One turn: its text as it is (a Markdown renderer would go here), and what the model thought before it, folded away.

export function Message({ message }) {
  return (
    <li className={message.role}>
      <h2>{message.role === "user" ? "You" : "Answer"}</h2>
      {message.parts.map((part, index) => (
        <Part key={index} part={part} /> // parts are only ever appended
      ))}
    </li>
  );
}

function Part({ part }) {
  if (part.type === "text") return <p className="text">{part.text}</p>;
  if (part.type === "reasoning") {
    return (
      <details className="reasoning">
        <summary>{part.state === "streaming" ? "Thinking…" : "Reasoning"}</summary>
        <p className="text">{part.text}</p>
      </details>
    );
  }
  return null; // step-start, which is a mark and no content
}
