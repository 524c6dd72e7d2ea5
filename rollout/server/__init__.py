"""The engine behind HTTP: as SGLang's server, OpenAI's and vLLM's, with health and metrics."""
