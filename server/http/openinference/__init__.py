"""Open Inference Protocol V2 over HTTP: the network itself, for clients that speak tensors."""
