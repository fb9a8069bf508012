"""The embedded demo model: an OpenAI-compatible server that answers out of the project's own documentation."""
