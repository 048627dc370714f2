"""The HTTP service: decoding, batching, backends, answers, errors."""
