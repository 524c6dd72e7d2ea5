"""Guesses what sequences say next, so that one step of the engine brings several tokens. No guess decides a bit."""
