"""The engine behind HTTP: `/generate` as SGLang's, `/v1` as OpenAI's, health and metrics."""
