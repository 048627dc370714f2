"""The serving process, its supervisor, and the connections that it holds."""
