"""Photos in, masks out: one in a request, or many."""
