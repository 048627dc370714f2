"""The process that serves, several of them, and the connections that they hold."""
