"""How new weights get from the trainer into running vLLM replicas: wire format, the sender, and vLLM's side of it."""
