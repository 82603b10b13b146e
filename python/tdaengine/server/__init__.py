"""The HTTP server: the OpenAI API, metrics and a page to chat on. Needs the extra [server]."""
