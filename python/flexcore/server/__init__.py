"""flexcore serve: OpenAI's routes over one engine that serves and finetunes at once. Needs flexcore[serve]."""
