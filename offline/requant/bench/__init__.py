"""`requant bench`: models served side by side by vLLM, driven by vLLM's own benchmark client, compared."""
