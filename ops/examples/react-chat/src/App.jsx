import { useState } from "react";

import { Conversation } from "./Conversation.jsx";
import { loadConversation, newConversation } from "./saved.js";

export function App() {
  const [saved, setSaved] = useState(loadConversation);

  return <Conversation key={saved.id} saved={saved} onNew={() => setSaved(newConversation())} />;
}
